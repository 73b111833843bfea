"""A lock on a folder, which the kernel lifts when its holder dies."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.errors import InputError


@contextmanager
def locked(folder: Path, refusal: str | None = None, patience: float = 0.0) -> Iterator[None]:
    """Hold the folder's lock, which is taken as `lock_of` does."""
    descriptor = lock_of(folder, refusal, patience)
    try:
        yield
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # forks may have the descriptor too
    finally:
        os.close(descriptor)


def lock_of(folder: Path, refusal: str | None = None, patience: float = 0.0) -> int:
    """Return a descriptor that holds the folder's lock.

    While another process has it, wait; with `refusal`, no longer than `patience` seconds, and raise it as
    InputError then. A folder that is gone, or another one by then, is a FileNotFoundError.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if refusal is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        elif not taken(descriptor, time.monotonic() + patience):
            raise InputError(f"{folder} {refusal}")
        # The lock is the folder's, whatever it is called: who had it may have renamed or removed the folder.
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(errno.ENOENT, "Another folder has its name now", str(folder))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def taken(descriptor: int, deadline: float) -> bool:
    """Take the lock before `deadline`, if it is free then."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
