"""The safetensors files of a checkpoint to be, laid out before any weight is read."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bridge.byte_copy import reserve, write_from
from bridge.chunk_plan import in_layers
from bridge.dtypes import ITEM_SIZES, TO_SAFETENSORS
from bridge.hf_checkpoint import SINGLE_SHARD


class Described(Protocol):
    """A tensor to be written."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


class Shard(NamedTuple):
    """A safetensors file to be: its header, and where each tensor begins."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int

    @property
    def payload_size(self) -> int:
        return self.size - len(self.header)


def plan_shards(tensors: Mapping[str, Described], limit: int) -> list[Shard]:
    """Share the tensors out over shards of at most `limit` bytes, layer by layer."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors, key=in_layers):
        if groups[-1] and size + tensors[name].nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensors[name].nbytes
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [SINGLE_SHARD]
    return [_plan_shard(name, group, tensors) for name, group in zip(names, groups, strict=True)]


def _plan_shard(file_name: str, names: list[str], tensors: Mapping[str, Described]) -> Shard:
    # Larger elements first, or those behind smaller ones would not be aligned.
    names = sorted(names, key=lambda name: -ITEM_SIZES[tensors[name].dtype])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, begins = 0, {}
    for name in names:
        tensor, begins[name] = tensors[name], position
        position += tensor.nbytes
        entries[name] = {
            "dtype": TO_SAFETENSORS[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begins[name], position],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    offsets = {name: len(header) + begin for name, begin in begins.items()}
    return Shard(file_name, header, offsets, len(header) + position)


def create_shard(path: Path, shard: Shard) -> None:
    """Write a shard's header and take the space for its tensors."""
    target = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        reserve(target, shard.size)
        write_from(target, shard.header, 0)
    finally:
        os.close(target)


def write_index(path: Path, shards: list[Shard], total: int) -> None:
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")
