"""Saving of a run: a folder gets its name when every rank's part is in it, and is then the latest.

With `checkpoint.async_save` the parts are written while the run trains on.
"""

import json
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from bridge.hf_checkpoint import side_files
from bridge.megatron_checkpoint import write_model
from bridge.pretrained import copy_model
from bridge.staging import SUFFIX, staged_folder
from training.checkpoint import state_of
from training.checkpoint_folders import flush, folder_of, remove_old, write_latest
from training.checkpoint_record import write_record
from training.checkpoint_writer import Writing
from training.resume_checks import RUN_CONFIG, describe_data
from training.setup import Run, whole_parameters

BYTES_PER_PARAMETER = 16  # the weight, its fp32 master and two fp32 moments, at most


class DroppedError(Exception):
    """Ends the staging of a folder that is given up."""


@dataclass
class Pending:
    """A checkpoint that is being written."""

    iteration: int
    folder: Path
    writing: Writing
    # on the first rank: closing it gives the folder its name, an error in it removes what was written
    staged: ExitStack
    began: float


@dataclass(frozen=True)
class Sealed:
    """A checkpoint that is complete, and the seconds from the beginning of its saving until then."""

    iteration: int
    folder: Path
    seconds: float


class Saver:
    """Saves the checkpoints of a run, one at a time; all ranks call its methods together, but `drop`."""

    def __init__(self) -> None:
        self._pending: Pending | None = None
        self._data: dict[str, Any] = {}
        self._removal: Thread | None = None

    def prepare(self, run: Run) -> None:
        """Note what the data are, as long as they are sure to be there."""
        if run.is_first_rank:
            self._data = describe_data(run.config)

    @property
    def is_pending(self) -> bool:
        return self._pending is not None

    def begin(self, run: Run) -> None:
        """Begin a checkpoint of the run as it is now; the one before must be finished."""
        assert self._pending is None
        began = time.monotonic()
        folder = folder_of(Path(str(run.config.checkpoint.save)), run.iteration)
        staged = ExitStack()
        torch.distributed.barrier()  # no rank may see the folder that another one makes
        if run.is_first_rank:
            staged.enter_context(self.staged(folder, size_of(run)))
        torch.distributed.barrier()
        with staged, whole_parameters(run):
            writing = Writing(state_of(run, is_loading=False), folder.with_name(folder.name + SUFFIX))
            kept = staged.pop_all()
        self._pending = Pending(run.iteration, folder, writing, kept, began)

    def poll(self, run: Run, in_use: Collection[Path] = ()) -> Sealed | None:
        """Seal the checkpoint under way if all of it has been written."""
        if self._pending is None or not self._pending.writing.is_done():
            return None
        return self.finish(run, in_use)

    def finish(self, run: Run, in_use: Collection[Path] = ()) -> Sealed | None:
        """Wait for the checkpoint under way and seal it; `in_use` are older ones that have to stay."""
        if self._pending is None:
            return None
        pending = self._pending
        with pending.staged:
            crcs = pending.writing.finish()
            if run.is_first_rank:
                self._describe(run, pending, crcs)
        self._pending = None
        run.source = pending.folder  # the one before may be removed now
        if run.is_first_rank:
            write_latest(pending.folder.parent, pending.iteration)
            self.wait_for_removal()
            k = run.config.checkpoint.most_recent_k
            self._removal = remove_old(pending.folder.parent, k, in_use)
        torch.distributed.barrier()
        return Sealed(pending.iteration, pending.folder, time.monotonic() - pending.began)

    @contextmanager
    def staged(self, folder: Path, nbytes: int) -> Iterator[Path]:
        """Yield the folder to write into; what retention has given up counts as free space."""
        self.wait_for_removal()
        with staged_folder(folder, nbytes) as partial:
            yield partial

    def wait_for_removal(self) -> None:
        """Wait until the files of the checkpoints that retention gave up are gone."""
        if self._removal is not None:
            self._removal.join()

    def drop(self) -> None:
        """Give up the checkpoint under way on this rank, after an error: the one before stays the latest."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.writing.drop()
            with suppress(DroppedError), pending.staged:
                raise DroppedError

    def _describe(self, run: Run, pending: Pending, crcs: dict[str, int]) -> None:
        partial = pending.folder.with_name(pending.folder.name + SUFFIX)
        describe(run, partial)
        write_record(partial, pending.iteration, self._data, crcs)
        # a machine that fails now must not leave a folder with its name and without its content
        flush(partial, but=crcs)


def describe(run: Run, folder: Path) -> None:
    """Add what export and people need: the model's description, its side files, the resolved config."""
    model = run.config.model
    if run.source is not None:
        copy_model(run.source, folder, num_padding_rows=model.num_padding_rows)
    else:
        tokenizer = run.config.tokenizer.tokenizer_model
        files = side_files(Path(tokenizer)) if tokenizer else ()
        write_model(folder, model, files, num_padding_rows=model.num_padding_rows)
    (folder / RUN_CONFIG).write_text(json.dumps(run.config.to_dict(), indent=1) + "\n")


def size_of(run: Run) -> int:
    """Return about how many bytes a checkpoint takes, were all pipeline stages like this one."""
    model = run.config.model
    counts = {True: 0, False: 0}
    for chunk in run.model:
        for parameter in chunk.parameters():
            # Megatron's mark of what data-parallel ranks do not share: experts
            counts[getattr(parameter, "allreduce", True)] += parameter.numel()
    dense = counts[True] * model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    return (dense + counts[False] * model.expert_ranks) * BYTES_PER_PARAMETER
