"""A result folder that exists completely or not at all: written beside its place, renamed at the end."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.errors import InputError

SUFFIX = ".partial"
SPARE_BYTES = 16 << 20  # for metadata and side files


@contextmanager
def staged_folder(destination: Path, nbytes: int) -> Iterator[Path]:
    """Yield a folder to write about `nbytes` bytes into; it becomes `destination` if the block ends well.

    What an earlier, interrupted writing left is removed first; another one under way is an InputError, and so
    are an existing destination and too little space.
    """
    if destination.exists():
        raise InputError(f"{destination} exists already: give another folder or remove it")
    partial = destination.with_name(destination.name + SUFFIX)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        try:
            _empty(partial)
            _check_space(partial, nbytes)
            yield partial
            partial.rename(destination)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(f"no space was left while writing {destination}: free some") from error
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _take_lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _take_lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{folder} is being written by another process: wait for it") from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes + SPARE_BYTES:
        raise InputError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, {(nbytes + SPARE_BYTES) / 1e9:.1f} GB are needed:"
            " free some space or give another folder"
        )
