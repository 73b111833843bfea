"""What live models on two ranks yield, load and refuse; one process group answers all tests."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bridge_jobs.live_job import LAYOUTS
from checkpoints import copy_checkpoint
from process_groups import run_ranks

CHECKS = (
    "whole",
    "small buckets",
    "buckets of one row",
    "one order",
    "some",
    "none",
    "unknown",
    "wider",
    "narrower",
    "first rank only",
    "described",
    "from Hugging Face",
    "from Megatron",
    "from single shards",
    "restricted_load",
    "restricted_load in parallel",
    "saves",
)
DAMAGED = "mlp.experts.experts.linear_fc2.weight"


@pytest.fixture(scope="module")
def measured(
    hf_checkpoint: Callable[..., Path],
    megatron_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("live")
    megatron = megatron_checkpoint("qwen3_moe")
    damaged = copy_checkpoint(megatron, folder / "damaged")
    damage_last_expert(damaged)
    ends = {"hf": hf_checkpoint("qwen3_moe"), "megatron": megatron, "damaged": damaged, "output": folder}
    return run_ranks(2, "bridge_jobs.live_job", {name: str(path) for name, path in ends.items()}, folder)


def damage_last_expert(folder: Path) -> None:
    """Spoil the last layer's last expert, which only the last rank of a pipeline or of the experts has."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    experts = [index for index in metadata.storage_data if index.fqn.endswith(DAMAGED)]
    item = metadata.storage_data[max(experts, key=lambda index: (index.fqn, index.offset))]
    with (folder / item.relative_path).open("r+b") as stream:
        stream.seek(item.offset + item.length - 200)
        stream.write(b"?" * 200)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_live_model(layout: str, check: str, measured: dict[str, Any]) -> None:
    assert check in measured[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_ranks_error_is_raised_on_all(layout: str, measured: dict[str, Any]) -> None:
    rank = 1 if layout in ("pp2", "ep2") else 0
    assert measured[f"{layout} error"].startswith(f"rank {rank}: ")
    assert DAMAGED in measured[f"{layout} error"]
