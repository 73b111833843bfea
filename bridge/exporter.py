"""Export: a Megatron checkpoint becomes Hugging Face shards by copying byte ranges, without a model."""

import dataclasses
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bridge.byte_copy import OpenFiles, Progress, ProgressCounter, for_each, write_from
from bridge.conversion import Conversion, check_unchanged, check_workers, origin_of
from bridge.dtypes import check_weight_dtype
from bridge.errors import CoverageError
from bridge.families import family_named
from bridge.hf_checkpoint import CONFIG, INDEX
from bridge.hf_view import HfView, ViewedTensor
from bridge.megatron_checkpoint import MegatronCheckpoint
from bridge.memory import DEFAULT_LIMIT, MemoryLimit
from bridge.refused_files import refused_files
from bridge.shard_plan import Shard, create_shard, plan_shards, write_index
from bridge.sizes import Size, parse_size
from bridge.staging import Journal, resumable_folder
from bridge.torch_dist.metadata import METADATA

MAX_RANGE_SIZE = 32 << 20  # bytes that a worker copies at a time


@refused_files()
def export_checkpoint(
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    workers: int = 2,
    max_memory: Size = DEFAULT_LIMIT,
    max_shard_size: Size = "5GB",
    dtype: str | None = None,
    progress: Progress | None = None,
    config_from: str | Path | None = None,
    family: str | None = None,
) -> Conversion:
    """Write a Megatron checkpoint, of Bridgeworks or of training, as a new Hugging Face folder.

    Weights keep their dtype, or are cast to `dtype`, and config.json follows it. `config_from` is a Hugging
    Face folder whose config and tokenizer are used instead of the checkpoint's own; a checkpoint of plain
    Megatron-LM, which has none, needs it, or the `family` (model_type) whose config its arguments fill.
    `progress(done, total)` is called with bytes. Anything wrong with the source or the destination is an
    InputError, and nothing new is left behind; a conversion that was killed or stopped goes on from its
    finished files.
    """
    began = time.monotonic()
    check_workers(workers)
    check_weight_dtype(dtype)
    memory = MemoryLimit(max_memory)
    limit = parse_size(max_shard_size, "max_shard_size")
    checkpoint = MegatronCheckpoint.open(megatron_path, config_from, family)
    with OpenFiles() as files:
        view = HfView(checkpoint, files, dtype)
        total = sum(tensor.nbytes for tensor in view.tensors.values())
        counter = ProgressCounter(total, progress)
        names = sorted({place.file for place in checkpoint.places})
        read = [checkpoint.path / name for name in (METADATA, *names)]
        origin = origin_of(view.plan, read, kind="export", dtype=dtype, max_shard_size=limit)
        with resumable_folder(Path(hf_path), total, origin) as journal:
            _write_config(journal.folder / CONFIG, checkpoint, view)
            for file in checkpoint.side_files:
                shutil.copyfile(file, journal.folder / file.name)
            _ShardWriter(view, journal, counter).write(plan_shards(view.tensors, limit), workers, memory)
            check_unchanged(origin)
    seconds, started_over = time.monotonic() - began, journal.started_over
    return Conversion(
        Path(hf_path), len(view.plan.hf_shapes), total, seconds, counter.resumed, started_over=started_over
    )


class _Range(NamedTuple):
    """Rows [first, first + num_rows) of a tensor, to be written at `position` of a shard."""

    tensor: str
    first: int
    num_rows: int
    shard: int
    position: int


class _ShardWriter:
    """Writes shards with several threads; one is finished when its last range is."""

    def __init__(self, view: HfView, journal: Journal, counter: ProgressCounter) -> None:
        self._view = view
        self._journal = journal
        self._counter = counter
        self._left: Counter[int] = Counter()
        self._lock = threading.Lock()

    def write(self, shards: list[Shard], workers: int, memory: MemoryLimit) -> None:
        """Write the shards that the journal does not know as finished, and the index of several."""
        if len(shards) > 1:
            write_index(self._journal.folder / INDEX, shards, self._counter.total)
        waiting = {n: shard for n, shard in enumerate(shards) if shard.name not in self._journal.finished}
        self._counter.start(sum(s.payload_size for n, s in enumerate(shards) if n not in waiting))
        workers = self._view.fit(memory, workers)
        ranges = [piece for n, shard in waiting.items() for piece in _ranges(n, shard, self._view.tensors)]
        self._left.update(piece.shard for piece in ranges)
        for shard in waiting.values():
            create_shard(self._journal.folder / shard.name, shard)
        with OpenFiles(os.O_WRONLY) as targets:
            for_each(lambda piece: self._copy(piece, shards, targets), _interleaved(ranges, workers), workers)

    def _copy(self, piece: _Range, shards: list[Shard], targets: OpenFiles) -> None:
        position = piece.position
        with targets.opened(self._journal.folder / shards[piece.shard].name) as target:
            for data in self._view.read(piece.tensor, piece.first, piece.num_rows):
                write_from(target, data, position)
                position += len(data)
        written = position - piece.position
        if written != piece.num_rows * self._view.tensors[piece.tensor].row_size:
            raise CoverageError(
                f"{piece.num_rows} rows of {piece.tensor!r} from row {piece.first} on were read as {written}"
                " bytes: the family's rules overlap or leave a gap"
            )
        with self._lock:
            self._left[piece.shard] -= 1
            finished = not self._left[piece.shard]
        if finished:
            self._journal.finish(shards[piece.shard].name)
        self._counter.add(written)


def _ranges(number: int, shard: Shard, tensors: dict[str, ViewedTensor]) -> Iterator[_Range]:
    for name, position in shard.offsets.items():
        tensor = tensors[name]
        step = max(1, MAX_RANGE_SIZE // tensor.row_size)
        for first in range(0, tensor.num_rows, step):
            count = min(step, tensor.num_rows - first)
            yield _Range(name, first, count, number, position + first * tensor.row_size)


def _interleaved(ranges: list[_Range], workers: int) -> list[_Range]:
    """Order the ranges so that workers are in different shards: a file system writes a file one by one."""
    part = -(-len(ranges) // workers)
    return [ranges[i] for start in range(part) for i in range(start, len(ranges), part)]


def _write_config(path: Path, checkpoint: MegatronCheckpoint, view: HfView) -> None:
    """Write config.json with the dtype that most of the weights have."""
    sizes: Counter[str] = Counter()
    for tensor in view.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    provider = dataclasses.replace(checkpoint.provider, params_dtype=sizes.most_common(1)[0][0])
    config = family_named(provider.hf_model_type).hf_config(provider)
    path.write_text(json.dumps(config, indent=2) + "\n")
