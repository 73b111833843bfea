"""Live models in every layout of two ranks; one process group answers many tests."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process_groups import run_ranks

from bridge import family_checks
from bridge.families import families, family_named
from bridge.family_checks import CPU, checks_of
from bridge.importer import import_checkpoint

CHECKPOINTS: dict[str, dict[str, Any]] = {
    **{name: {"family": name} for name in families()},
    "llama tied": {"family": "llama", "tie_word_embeddings": True},
    "deepseek_v3 predicting two": {"family": "deepseek_v3", "num_nextn_predict_layers": 2},
    "glm4_moe predicting": {"family": "glm4_moe", "num_nextn_predict_layers": 1},
}


def layouts_of(name: str) -> list[str]:
    family = family_named(name)
    return [layout for layout in family_checks.layouts_of(family) if checks_of(family)[layout] == CPU]


CASES = [
    (name, layout) for name, settings in CHECKPOINTS.items() for layout in layouts_of(settings["family"])
]


# So many checkpoints for one process group: a start takes ten seconds, one test at most five minutes.
BATCH = 5
Measured = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def measured(hf_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Return what the job found out about a checkpoint, by layout."""
    names = list(CHECKPOINTS)

    @functools.cache
    def measure(batch: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("layouts")
        ends: dict[str, dict[str, Any]] = {}
        for name in names[batch * BATCH : (batch + 1) * BATCH]:
            hf, megatron = hf_checkpoint(**CHECKPOINTS[name]), folder / name
            import_checkpoint(hf, megatron)
            layouts = layouts_of(CHECKPOINTS[name]["family"])
            ends[name] = {"hf": str(hf), "megatron": str(megatron), "layouts": layouts}
        return run_ranks(2, "bridge_jobs.layouts_job", {"checkpoints": ends}, folder)

    return lambda name: measure(names.index(name) // BATCH)[name]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_weights_are_bitwise_those_of_the_files(name: str, layout: str, measured: Measured) -> None:
    assert measured(name)[layout]["from_hf"]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_megatron_loads_an_imported_checkpoint_bitwise(name: str, layout: str, measured: Measured) -> None:
    assert measured(name)[layout]["from_megatron"]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_gradients_agree_with_transformers(name: str, layout: str, measured: Measured) -> None:
    assert measured(name)[layout]["gradients"] < 1e-4


@pytest.mark.parametrize(("name", "layout"), [case for case in CASES if case[1] != "pp2 vpp2"])
def test_logits_agree_with_transformers(name: str, layout: str, measured: Measured) -> None:
    assert measured(name)[layout]["max_abs"] < 1e-4
