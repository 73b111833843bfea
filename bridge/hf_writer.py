"""Writes tensors that arrive one by one, in any order, as the safetensors shards of a checkpoint."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from bridge.byte_copy import OpenFiles, ProgressCounter, write_from
from bridge.dtypes import ITEM_SIZES
from bridge.errors import CheckpointError
from bridge.hf_checkpoint import INDEX
from bridge.mapping import Shape
from bridge.shard_plan import create_shard, plan_shards, write_index
from bridge.sizes import Size, parse_size


class TensorDescription(NamedTuple):
    """Shape and dtype of a tensor that is to arrive."""

    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * ITEM_SIZES[self.dtype]


def write_shards(
    folder: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    described: Mapping[str, TensorDescription],
    max_shard_size: Size = "5GB",
    counter: ProgressCounter | None = None,
) -> None:
    """Write `weights` into `folder`, each to its place when it arrives; all that are `described` must.

    The tensors may be on any device; no more than one is held.
    """
    shards = plan_shards(described, parse_size(max_shard_size, "max_shard_size"))
    for shard in shards:
        create_shard(folder / shard.name, shard)
    places = {name: (shard.name, at) for shard in shards for name, at in shard.offsets.items()}
    with OpenFiles(os.O_WRONLY) as files:
        for name, weight in weights:
            data = weight.cpu().contiguous().flatten().view(torch.uint8)
            if len(data) != described[name].nbytes:
                raise CheckpointError(
                    f"{name} arrived as {weight.dtype} {list(weight.shape)}: not as described"
                )
            file, offset = places.pop(name)
            with files.opened(folder / file) as target:
                write_from(target, memoryview(data.numpy()), offset)
            if counter:
                counter.add(len(data))
    if places:
        raise CheckpointError(f"weights for {', '.join(sorted(places))} did not arrive")
    if len(shards) > 1:
        write_index(folder / INDEX, shards, sum(tensor.nbytes for tensor in described.values()))
