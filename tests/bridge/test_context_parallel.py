"""Whole models with each sequence spread over two ranks; one process group answers all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from process_groups import run_ranks

# Each has something of its own in attention: capped logits, two ropes, a window and a rope by length, queries
# scaled by position, sinks, keys and values of different sizes.
FAMILIES = ["gemma2", "gemma3_text", "phi3", "ministral3", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module")
def measured(
    hf_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    checkpoints = {family: str(hf_checkpoint(family, dtype="float32")) for family in FAMILIES}
    folder = tmp_path_factory.mktemp("context")
    return run_ranks(2, "bridge_jobs.context_job", {"checkpoints": checkpoints}, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spread_sequence_has_the_loss_and_gradients_of_a_whole_one(
    family: str, measured: dict[str, dict[str, float]]
) -> None:
    assert measured[family]["loss"] < 1e-6
    assert measured[family]["gradients"] < 2e-5
