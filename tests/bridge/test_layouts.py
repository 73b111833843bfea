"""Live models in every layout of two ranks; one process group answers all tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process_groups import run_ranks

from bridge.families import families
from bridge.importer import import_checkpoint

CHECKPOINTS: dict[str, dict[str, Any]] = {
    **{name: {"family": name} for name in families()},
    "llama tied": {"family": "llama", "tie_word_embeddings": True},
}
LAYOUTS = ["tp2", "tp2 sequence parallel", "pp2", "pp2 vpp2", "dp2"]


@pytest.fixture(scope="module")
def measured(
    hf_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    ends: dict[str, dict[str, str]] = {}
    for name, settings in CHECKPOINTS.items():
        hf, megatron = hf_checkpoint(**settings), folder / name
        import_checkpoint(hf, megatron)
        ends[name] = {"hf": str(hf), "megatron": str(megatron)}
    return run_ranks(2, "bridge_jobs.layouts_job", {"checkpoints": ends}, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_bitwise_those_of_the_files(
    name: str, layout: str, measured: dict[str, dict[str, Any]]
) -> None:
    assert measured[name][layout]["from_hf"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_megatron_loads_an_imported_checkpoint_bitwise(
    name: str, layout: str, measured: dict[str, dict[str, Any]]
) -> None:
    assert measured[name][layout]["from_megatron"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_gradients_agree_with_transformers(
    name: str, layout: str, measured: dict[str, dict[str, Any]]
) -> None:
    assert measured[name][layout]["gradients"] < 1e-4


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "pp2 vpp2"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_agree_with_transformers(name: str, layout: str, measured: dict[str, dict[str, Any]]) -> None:
    assert measured[name][layout]["max_abs"] < 1e-4
