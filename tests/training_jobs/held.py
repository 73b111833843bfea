"""A job of the tests: `training.pretrain`, held at places of the test's choice until the test goes on."""

import itertools
import os
import signal
import time
from typing import Any

from training import checkpoint_writer, gpt_step, pretrain
from training.callbacks import StopOnSignal

WAITING_RANK = "0"


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Train.

    The writers of the folder "hold", unless it is None, stop when the first tensor is in their file; the
    first rank waits at micro-batch "wait_at", unless that is None, until it is told to stop.
    """
    if config["hold"] is not None:
        checkpoint_writer._write_item = stopping(config["hold"])
    if config["wait_at"] is not None and os.environ["RANK"] == WAITING_RANK:
        gpt_step.forward_step = waiting(config["wait_at"])
    return pretrain.main(config)


def stopping(folder: str) -> Any:
    """Return the function that writes a tensor, and stops its process after the first in `folder`."""
    calls, write = itertools.count(), checkpoint_writer._write_item

    def write_item(transforms: Any, file: Any, *arguments: Any) -> Any:
        written = write(transforms, file, *arguments)
        # a writer is a fork with a count of its own, which its threads share
        if f"/{folder}." in file.name and next(calls) == 0:
            file.flush()
            os.kill(os.getpid(), signal.SIGSTOP)
        return written

    return write_item


def waiting(at: int) -> Any:
    """Return the forward step that waits for SIGTERM before micro-batch `at`."""
    calls, told, step, note = itertools.count(), [], gpt_step.forward_step, StopOnSignal.note

    def note_and_tell(self: StopOnSignal, number: int, frame: Any) -> None:
        note(self, number, frame)
        told.append(number)

    def forward_step(data_iterator: Any, model: Any) -> Any:
        if next(calls) == at:
            while not told:
                time.sleep(0.01)
        return step(data_iterator, model)

    StopOnSignal.note = note_and_tell
    return forward_step
