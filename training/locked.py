"""A lock on a folder, which the kernel lifts when its holder dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.errors import InputError


@contextmanager
def locked(folder: Path, refusal: str | None = None) -> Iterator[None]:
    """Hold the folder's lock; while another process does, wait, or raise `refusal` as InputError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        yield
    except BlockingIOError as error:
        raise InputError(f"{folder} {refusal}") from error
    finally:
        os.close(descriptor)
