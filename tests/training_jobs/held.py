"""A job of the tests: `training.pretrain`, where the writer of one checkpoint stops in the middle of it."""

import itertools
import os
import signal
from typing import Any

from training import checkpoint_writer, pretrain


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Train; the writer of the folder "hold", if one is named, stops when the first tensor is in its file."""
    if config["hold"] is not None:
        checkpoint_writer._write_item = stopping(config["hold"])
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
