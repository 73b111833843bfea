"""What two ranks save together, and that an error of one is one of both; one job answers all tests."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import run_ranks
from safetensors.torch import load_file

from bridge.exporter import export_checkpoint
from bridge.ledger import compare_ledgers, ledger

FLOAT32 = "e_score_correction_bias"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def measured(
    hf_checkpoint: Callable[..., Path], megatron_checkpoint: Callable[..., Path], output: Path
) -> dict[str, Any]:
    ends = {
        "llama": hf_checkpoint("llama"),
        "deepseek_v3": hf_checkpoint("deepseek_v3"),
        "other": megatron_checkpoint("llama", vocab_size=200),
        "output": output,
    }
    return run_ranks(2, "bridge_jobs.saving_job", {name: str(path) for name, path in ends.items()}, output)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("hf exists", "rank 0: .* exists already"),
        ("megatron exists", "rank 0: .* exists already"),
        ("hf size", "rank 0: max_shard_size"),
        ("other vocabulary", "the model has a vocabulary of 160 tokens, .* one of 200"),
        ("overflow", "rank 1: 'model.layers.1.mlp.down_proj.weight' .* overflow in float16"),
        ("overflow yielded", "rank 1: 'model.layers.1.mlp.down_proj.weight' .* overflow in float16"),
    ],
)
def test_an_error_of_one_rank_is_raised_on_both(what: str, message: str, measured: dict[str, Any]) -> None:
    assert re.match(message, measured[what]), measured[what]


@pytest.mark.parametrize(
    ("what", "own", "told"),
    [
        (
            "hf no space",
            "is larger than its file system or `ulimit -f` allows",
            "rank 0: OSError: .*File too large",
        ),
        # torch's writer of zip files does not pass on what the system said
        ("megatron no space", "could not be written: rank 0: Worker", "could not be written: rank 0: Worker"),
    ],
)
def test_a_disk_that_is_full_for_one_rank_stops_both(
    what: str, own: str, told: str, measured: dict[str, Any]
) -> None:
    first, second = measured[what]
    assert re.search(own, first)
    assert re.search(told, second)


def test_nothing_is_left_of_what_failed(measured: dict[str, Any]) -> None:
    assert measured["left"] == []


def test_the_padding_of_two_ranks_is_recorded_and_taken_off(
    measured: dict[str, Any], output: Path, hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert "left" in measured
    assert json.loads((output / "megatron" / "model.json").read_text())["num_padding_rows"] == 96
    export_checkpoint(output / "megatron", tmp_path / "hf")
    for folder in (tmp_path / "hf", output / "hf"):
        assert compare_ledgers(ledger(hf_checkpoint("llama")), ledger(folder)).passed


def test_what_megatron_keeps_in_float32_is_not_cast(measured: dict[str, Any], output: Path) -> None:
    assert measured["kept in float32"]
    saved = {n: w for file in (output / "deepseek").glob("*.safetensors") for n, w in load_file(file).items()}
    biases = {name for name in saved if name.endswith(FLOAT32)}
    assert biases
    assert all((w.dtype is torch.float32) == (name in biases) for name, w in saved.items())
