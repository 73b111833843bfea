"""Writing of a rank's part of a checkpoint by a process of its own, while the rank trains on.

Megatron Core's asynchronous save, with its forked writer ("temporal"): the process has the tensors as they
were at the fork, so that nothing is copied that training does not change in the meantime. What differs is
that the writer uses threads where Megatron forks once more for each file: a fork that is killed would be
waited for without end, and the queue to it is a third process, which takes six seconds to start with a GPU.
"""

import os
import pickle
import queue
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
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from bridge.restricted_load import reason


class Results:
    """What a forked writer hands back: a file without a name, which takes any amount and never blocks."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this lives)

    def put(self, value: Any) -> None:
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return what the writer put; an error when it has ended without, as Megatron expects one."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:
            return RuntimeError("the process that wrote it was killed")


def write_files(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Results
) -> None:
    """Write a file for each bucket and hand back where the tensors lie, or the first error."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the rank finishes its checkpoint before it leaves
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # a fork has none of the threads that OpenMP thinks it has
    with ThreadPoolExecutor(len(buckets)) as threads:
        written = list(threads.map(lambda bucket: write_file(transforms, bucket), buckets))
    errors = [each for each in written if isinstance(each, Exception)]
    results.put(errors[0] if errors else dict(enumerate(written)))


def write_file(transforms: list[Any], bucket: Any) -> Any:
    """Return Megatron's list of what is where in the file, or the error, as it does."""
    path, name, (objects, tensors) = bucket
    waiting: queue.Queue[int] = queue.Queue()
    waiting.put(0)
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
    bucket = (path, name, (objects, ((item, compact(tensor)) for item, tensor in tensors)))
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, answer, waiting, use_fsync=True)
    written = answer.get()[1]
    return first_cause(written) if isinstance(written, Exception) else written


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
def forked_writers() -> Iterator[None]:
    """Put the writer above where Megatron's strategy looks its own up."""
    original = torch_strategy.FileSystemWriterAsync
    torch_strategy.FileSystemWriterAsync = ForkedWriter
    try:
        yield
    finally:
        torch_strategy.FileSystemWriterAsync = original


class Writing:
    """The writing of one checkpoint into a folder, by every rank; all ranks call its methods together."""

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        """Plan, copy from the GPU and fork: when this returns, the tensors may change."""
        self._folder = folder
        self._caller = TemporalAsyncCaller()
        with forked_writers():
            self._request = dist_checkpointing.save(state, str(folder), async_sharded_save=True)
        self._caller.schedule_async_call(self._request)

    @property
    def process_id(self) -> int | None:
        """That of this rank's writer, while there is one."""
        return self._caller.process and self._caller.process.pid

    def is_done(self) -> bool:
        """Say whether the writers of all ranks have ended: a sum of one number over all ranks."""
        return self._caller.is_current_async_call_done(blocking=False)

    def finish(self) -> None:
        """Wait for all writers, and write what says where everything lies; their failure is an error."""
        self._caller.is_current_async_call_done(blocking=True)
        try:
            for step in self._request.finalize_fns:
                step()
        except CheckpointException as error:
            # no verdict on what was asked for: another attempt may find more space or memory
            raise RuntimeError(f"{self._folder} could not be written: {reason(error)}") from error

    def drop(self) -> None:
        """End this rank's writer, whatever the others do."""
        if self.process_id is not None:
            os.kill(self.process_id, signal.SIGKILL)
            self._caller.process.join()
            self._caller.process = None
