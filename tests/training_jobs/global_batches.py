"""A job of the tests: the tokens of the global batches that ranks read, in one layout after the other."""

from typing import Any

import torch
from megatron.core import parallel_state

from training.config import DatasetConfig
from training.data import Batch, batches, build_datasets


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Return the token sequences of every reading in `readings`, [global batches, samples, tokens]."""
    torch.distributed.init_process_group("gloo")
    return {name: read(**reading) for name, reading in config["readings"].items()}


def read(
    dataset: dict[str, Any],
    tensor_model_parallel_size: int,
    micro: int,
    size: int,
    steps: range,
    total: int,
) -> list[list[list[int]]]:
    """Read the global batches `steps` of a run of `total` samples, as ranks of this layout."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size)
    settings = DatasetConfig(**dataset)
    train = build_datasets(settings, {"train": total}, 16, 300)["train"]
    first, last = steps
    iterator = batches(
        train, consumed_samples=first * size, micro_batch_size=micro, num_workers=settings.num_workers
    )
    turns = size // (micro * parallel_state.get_data_parallel_world_size())
    found = [[row for _ in range(turns) for row in gathered(next(iterator))] for _ in range(first, last)]
    parallel_state.destroy_model_parallel()
    return found


def gathered(batch: Batch) -> list[list[int]]:
    """Return the samples that the data-parallel ranks read at the same time, in the order of the ranks."""
    group = parallel_state.get_data_parallel_group()
    parts = [torch.empty_like(batch["tokens"]) for _ in range(group.size())]
    torch.distributed.all_gather(parts, batch["tokens"], group=group)
    return torch.cat(parts).tolist()
