"""Writing of a rank's part of a checkpoint by a process of its own, while the rank trains on.

Megatron Core's asynchronous save, with its forked writer ("temporal"): the process has the tensors as they
were at the fork, so that nothing is copied that training does not change in the meantime. What differs is
that the writer uses threads where Megatron forks once more for each file: a fork that is killed would be
waited for without end, and the queue to it is a third process, which takes six seconds to start with a GPU.
"""

import gc
import io
import itertools
import os
import pickle
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from bridge.byte_copy import crc32
from bridge.restricted_load import reason


class Results:
    """What a forked writer hands back: a file without a name, which takes any amount and never blocks."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this lives)
        # the CRC-32 of each file, known when the results have been read
        self.crcs: dict[str, int] = {}

    def put(self, value: Any) -> None:
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return Megatron's list of what is where by file, or the writer's error, as Megatron expects it."""
        self._file.seek(0)
        try:
            value = pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):  # it has ended without, or in the middle of it
            return RuntimeError("the process that wrote it was killed")
        if isinstance(value, Exception):
            return value
        places, self.crcs = value
        return places


class DigestedFile(io.BufferedWriter):
    """A new file that knows the CRC-32 of what was written to it, one piece after the other."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.crc = 0

    def write(self, data: Any) -> int:
        self.crc = crc32(data, self.crc)
        return super().write(data)


def write_files(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Results
) -> None:
    """Write a file for each bucket and hand back where the tensors lie, or the first error."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the rank finishes its checkpoint before it leaves
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # tensors of the parent's GPU must not be freed here
    torch.set_num_threads(1)  # a fork has none of the threads that OpenMP thinks it has
    try:
        with ThreadPoolExecutor(len(buckets)) as threads:
            written = list(threads.map(lambda bucket: write_file(transforms, bucket), buckets))
    except Exception as error:  # the rank that waits for the results raises it
        results.put(first_cause(error))
        return
    crcs = {name: crc for (_, name, _), (_, crc) in zip(buckets, written, strict=True)}
    results.put(({number: places for number, (places, _) in enumerate(written)}, crcs))


def write_file(transforms: list[Any], bucket: Any) -> tuple[list[Any], int]:
    """Write a file that is on disk when this returns; return what is where in it, and its CRC-32."""
    path, name, (objects, tensors) = bucket
    items = itertools.chain(objects, ((item, compact(tensor)) for item, tensor in tensors))
    with DigestedFile(path) as file:
        places = [
            _write_item(*transforms, file, data, item, name, SerializationFormat.TORCH_SAVE)
            for item, data in items
        ]
        file.flush()  # Megatron's own writer forgets it, and with it up to 8 KiB of every file
        os.fsync(file.fileno())
        return places, file.crc


def first_cause(error: BaseException) -> BaseException:
    """Return what made torch's zip writer give up, such as a full disk, rather than that it did."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose storage has nothing else, as all of that would be written."""
    is_whole = tensor.untyped_storage().size() == tensor.numel() * tensor.itemsize
    return tensor if is_whole else tensor.clone()


class ForkedWriter(FileSystemWriterAsync):
    """Megatron's writer, without a copy of each tensor that is a part of a buffer: the fork is one of all."""

    write_preloaded_data_multiproc = staticmethod(write_files)

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Choose files for the tensors and objects of this rank, about equally large ones."""
        filled = [items for items in _split_by_size_and_type(self.thread_count, plan.items) if items]
        self.write_buckets = [
            self._bucket(f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}", items, planner)
            for number, items in enumerate(filled)
        ]
        self.results_queue = Results() if filled else None

    def _bucket(self, name: str, items: list[WriteItem], planner: SavePlanner) -> Any:
        def resolved(objects: bool) -> list[Any]:
            chosen = [item for item in items if (item.type == WriteItemType.BYTE_IO) == objects]
            return [(item, planner.resolve_data(item)) for item in chosen]

        tensors = [(item, tensor.detach()) for item, tensor in resolved(objects=False)]
        return str(Path(self.checkpoint_dir, name)), name, (resolved(objects=True), tensors)


@contextmanager
def forked_writers() -> Iterator[list[ForkedWriter]]:
    """Put the writer above where Megatron's strategy looks its own up; yield those that it makes."""
    original, made = torch_strategy.FileSystemWriterAsync, []

    def make(*arguments: Any, **options: Any) -> ForkedWriter:
        made.append(ForkedWriter(*arguments, **options))
        return made[-1]

    torch_strategy.FileSystemWriterAsync = make
    try:
        yield made
    finally:
        torch_strategy.FileSystemWriterAsync = original


class Writing:
    """The writing of one checkpoint into a folder, by every rank; all ranks call its methods together."""

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        """Plan, copy from the GPU and fork: when this returns, the tensors may change."""
        self._folder = folder
        self._caller = TemporalAsyncCaller()
        with forked_writers() as writers:
            self._request = dist_checkpointing.save(state, str(folder), async_sharded_save=True)
        self._results = [writer.results_queue for writer in writers if writer.results_queue is not None]
        self._caller.schedule_async_call(self._request)

    @property
    def process_id(self) -> int | None:
        """That of this rank's writer, while there is one."""
        return self._caller.process and self._caller.process.pid

    def is_done(self) -> bool:
        """Say whether the writers of all ranks have ended: a sum of one number over all ranks."""
        return self._caller.is_current_async_call_done(blocking=False)

    def finish(self) -> dict[str, int]:
        """Wait for all writers, and write what says where everything lies; their failure is an error.

        Returns the CRC-32 of each file with tensors, on the first rank; nothing on the others.
        """
        self._caller.is_current_async_call_done(blocking=True)
        try:
            for step in self._request.finalize_fns:
                step()
        except CheckpointException as error:
            # no verdict on what was asked for: another attempt may find more space or memory
            raise RuntimeError(f"{self._folder} could not be written: {reason(error)}") from error
        return self._all_crcs()

    def _all_crcs(self) -> dict[str, int]:
        mine = {name: crc for results in self._results for name, crc in results.crcs.items()}
        is_first = torch.distributed.get_rank() == 0
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.gather_object(mine, everyone if is_first else None, dst=0)
        return {name: crc for each in everyone for name, crc in each.items()} if is_first else {}

    def drop(self) -> None:
        """End this rank's writer, whatever the others do."""
        if self.process_id is not None:
            os.kill(self.process_id, signal.SIGKILL)
            self._caller.process.join()
            self._caller.process = None
