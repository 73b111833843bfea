"""Export: a Megatron checkpoint becomes Hugging Face shards by copying byte ranges, without a model."""

import dataclasses
import json
import os
import re
import shutil
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bridge.byte_copy import OpenFiles, Progress, ProgressCounter, for_each, write_from
from bridge.conversion import Conversion, check_workers
from bridge.dtypes import ITEM_SIZES, TO_SAFETENSORS
from bridge.errors import ConfigError
from bridge.families import family_named
from bridge.hf_checkpoint import CONFIG, INDEX, SINGLE_SHARD
from bridge.hf_view import HfView, ViewedTensor
from bridge.megatron_checkpoint import MegatronCheckpoint
from bridge.staging import staged_folder

MAX_RANGE_SIZE = 32 << 20  # bytes that a worker copies at a time
SIZE_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def export_checkpoint(
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    workers: int = 2,
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
    config_from: str | Path | None = None,
) -> Conversion:
    """Write a Megatron checkpoint, of Bridgeworks or of training, as a new Hugging Face folder.

    Weights keep their dtype and config.json follows it. `config_from` is a Hugging Face folder whose config
    and tokenizer are used instead of the checkpoint's own. `progress(done, total)` is called with bytes.
    Anything wrong with the source or the destination is an InputError, and nothing is left behind.
    """
    began = time.monotonic()
    check_workers(workers)
    limit = parse_size(max_shard_size)
    checkpoint = MegatronCheckpoint.open(megatron_path, config_from)
    with OpenFiles() as files:
        view = HfView(checkpoint, files)
        total = sum(tensor.nbytes for tensor in view.tensors.values())
        with staged_folder(Path(hf_path), total) as folder:
            _write_weights(folder, view, limit, workers, ProgressCounter(total, progress))
            _write_config(folder / CONFIG, checkpoint, view)
            for file in checkpoint.side_files:
                shutil.copyfile(file, folder / file.name)
    return Conversion(Path(hf_path), len(view.tensors), total, time.monotonic() - began)


def parse_size(text: str) -> int:
    """Read a size such as "5GB" or "200MiB" in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in SIZE_UNITS or float(match[1]) <= 0:
        raise ConfigError(
            f"max_shard_size is {text!r}: give a number with one of {', '.join(SIZE_UNITS)[2:]}"
        )
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])


class _Shard(NamedTuple):
    """A safetensors file to be: its header, and where each tensor begins."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int


class _Range(NamedTuple):
    """Rows [first, first + num_rows) of a tensor, to be written at `position` of a shard."""

    tensor: str
    first: int
    num_rows: int
    shard: int
    position: int


def _write_weights(folder: Path, view: HfView, limit: int, workers: int, counter: ProgressCounter) -> None:
    shards = _plan_shards(view.tensors, limit)
    targets = [_create(folder / shard.name, shard) for shard in shards]
    try:
        ranges = [
            piece for number, shard in enumerate(shards) for piece in _ranges(number, shard, view.tensors)
        ]
        for_each(lambda piece: _copy(piece, view, targets, counter), _interleaved(ranges, workers), workers)
    finally:
        for target in targets:
            os.close(target)
    if len(shards) > 1:
        _write_index(folder / INDEX, shards, counter.total)


def _plan_shards(tensors: dict[str, ViewedTensor], limit: int) -> list[_Shard]:
    """Share the tensors out over shards of at most `limit` bytes, layer by layer."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors, key=_by_layer):
        if groups[-1] and size + tensors[name].nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensors[name].nbytes
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [SINGLE_SHARD]
    return [_plan_shard(name, group, tensors) for name, group in zip(names, groups, strict=True)]


def _by_layer(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _plan_shard(file_name: str, names: list[str], tensors: dict[str, ViewedTensor]) -> _Shard:
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
    return _Shard(file_name, header, offsets, len(header) + position)


def _create(path: Path, shard: _Shard) -> int:
    target = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    write_from(target, shard.header, 0)
    os.ftruncate(target, shard.size)
    return target


def _ranges(number: int, shard: _Shard, tensors: dict[str, ViewedTensor]) -> Iterator[_Range]:
    for name, position in shard.offsets.items():
        tensor = tensors[name]
        step = max(1, MAX_RANGE_SIZE // tensor.row_size)
        for first in range(0, tensor.shape[0], step):
            count = min(step, tensor.shape[0] - first)
            yield _Range(name, first, count, number, position + first * tensor.row_size)


def _interleaved(ranges: list[_Range], workers: int) -> list[_Range]:
    """Order the ranges so that workers are in different shards: a file system writes a file one by one."""
    part = -(-len(ranges) // workers)
    return [ranges[i] for start in range(part) for i in range(start, len(ranges), part)]


def _copy(piece: _Range, view: HfView, targets: list[int], counter: ProgressCounter) -> None:
    position = piece.position
    for data in view.read(piece.tensor, piece.first, piece.num_rows):
        write_from(targets[piece.shard], data, position)
        position += len(data)
    assert position == piece.position + piece.num_rows * view.tensors[piece.tensor].row_size, piece
    counter.add(position - piece.position)


def _write_index(path: Path, shards: list[_Shard], total: int) -> None:
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")


def _write_config(path: Path, checkpoint: MegatronCheckpoint, view: HfView) -> None:
    """Write config.json with the dtype that most of the weights have."""
    sizes: Counter[str] = Counter()
    for tensor in view.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    provider = dataclasses.replace(checkpoint.provider, params_dtype=sizes.most_common(1)[0][0])
    config = family_named(provider.hf_model_type).hf_config(provider)
    path.write_text(json.dumps(config, indent=2) + "\n")
