"""A result folder that exists completely or not at all: written beside its place, renamed at the end.

One whose writing was interrupted is gone on with, from the files that were finished.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bridge.errors import InputError, StoppedError
from bridge.folder_lock import lock_of
from bridge.sizes import readable_size

SUFFIX = ".bridgeworks.partial"  # of a folder that is ours to empty: nobody else gives this name
JOURNAL = ".journal"
AGAIN = ".journal.new"  # one that is written again without what was damaged
SPARE_BYTES = 16 << 20  # for metadata and side files
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The files of a folder that are finished: a line each, after one that says what the folder is made of.

    Lines are trusted only until the machine starts anew: what a killed process wrote is safe in the kernel's
    memory, what a power failure left may not be. So no file has to be flushed to disk.
    """

    def __init__(self, folder: Path, origin: dict[str, Any]) -> None:
        """Keep the finished files of an earlier writing with the same `origin`; remove everything else.

        `started_over` names what is different now, if that is why an earlier writing's files are not kept.
        """
        self.folder = folder
        self._lock = threading.Lock()
        head = json.dumps({"origin": origin, "boot": boot_id()}, sort_keys=True)
        found = _entries(folder)
        same = found[:1] == [json.loads(head)]
        self.finished = _finished_files(folder, found[1:]) if same else {}
        self.started_over = () if same or len(found) < 2 else _differences(found[0], json.loads(head))
        _empty(folder, keep=(JOURNAL, *self.finished) if self.finished else ())
        self._lines = [head, *(json.dumps(entry) for entry in self.finished.items())]
        if self.finished:
            self._write(AGAIN)
            (folder / AGAIN).replace(folder / JOURNAL)  # or one that is killed here would lose them all

    def finish(self, name: str) -> None:
        """Say that a file is completely written.

        The first makes the journal: it goes at the end, and some file systems free space only behind all that
        is being written (ext4 mounted with `discard`: measured, 20 to 100 ms after 3 GB). One of a single
        file is gone before it has taken any.
        """
        with self._lock:
            self._lines.append(json.dumps([name, (self.folder / name).stat().st_size]))
            self._write(JOURNAL)

    def _write(self, name: str) -> None:
        with (self.folder / name).open("a") as journal:
            journal.writelines(f"{line}\n" for line in self._lines)
        self._lines.clear()


def boot_id() -> str:
    """Return what tells one start of the machine from the next."""
    # Without one (not on Linux) no journal is trusted that another process wrote.
    return BOOT_ID.read_text().strip() if BOOT_ID.is_file() else f"process {os.getpid()}"


def _differences(*heads: dict[str, Any]) -> tuple[str, ...]:
    """Name what two journals say otherwise in their first lines."""
    before, now = ({"boot": head["boot"], **head["origin"]} for head in heads)
    return tuple(name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name))


def _finished_files(folder: Path, entries: list[tuple[str, int]]) -> dict[str, int]:
    paths = {name: folder / name for name, _ in entries}
    return {n: size for n, size in entries if paths[n].is_file() and paths[n].stat().st_size == size}


def _entries(folder: Path) -> list[Any]:
    """Return what the journal's lines say, up to the first one that is damaged.

    The last may be cut off; after a power failure some file systems have zeros for what was not written yet.
    """
    journal, entries = folder / JOURNAL, []
    with suppress(ValueError):
        for line in journal.read_bytes().splitlines() if journal.is_file() else []:
            entries.append(json.loads(line))
    return entries


@contextmanager
def staged_folder(destination: Path, nbytes: int) -> Iterator[Path]:
    """Yield a folder to write about `nbytes` bytes into; it becomes `destination` if the block ends well.

    What an earlier, interrupted writing left is removed first; another one under way is an InputError, and so
    are an existing destination and too little space.
    """
    with _partial_folder(destination) as partial:
        try:
            _empty(partial)
            _check_space(partial, nbytes)
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _give_name(partial, destination)


@contextmanager
def resumable_folder(destination: Path, nbytes: int, origin: dict[str, Any]) -> Iterator[Journal]:
    """Yield the journal of a folder that becomes `destination`, as `staged_folder` does.

    `origin` is all that the content depends on, as JSON values. A writing that is killed, interrupted or
    stopped (StoppedError) can be gone on with: finished files are still there in the next one of the same
    origin. After any other error nothing is left but what an earlier writing had finished: hours of work are
    not lost by a disk that is full or a setting that is wrong.
    """
    with _partial_folder(destination) as partial:
        journal = Journal(partial, origin)
        try:
            _check_space(partial, nbytes - sum(journal.finished.values()))
            yield journal
            (partial / JOURNAL).unlink(missing_ok=True)
        except StoppedError:
            raise
        except Exception:
            if journal.finished:
                _empty(partial, keep=(JOURNAL, *journal.finished))
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        _give_name(partial, destination)


@contextmanager
def _partial_folder(destination: Path) -> Iterator[Path]:
    """Make the folder beside `destination` and lock it; running out of space is an InputError."""
    _refuse_existing(destination)  # . and / among them, which have no name
    partial = destination.with_name(destination.name + SUFFIX)
    descriptor = _locked(partial, destination)
    try:
        yield partial
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"no space was left while writing {destination}: free some") from error
        if error.errno == errno.EFBIG:
            raise InputError(
                f"a file of {destination} is larger than its file system or `ulimit -f` allows: give another"
                " folder or a higher limit, or export smaller shards"
            ) from error
        raise
    finally:
        os.close(descriptor)


def _refuse_existing(destination: Path) -> None:
    if os.path.lexists(destination):  # a link that leads nowhere is in the way as well
        raise InputError(f"{destination} exists already: give another folder or remove it")


def _locked(partial: Path, destination: Path) -> int:
    """Make the folder `partial`; return a descriptor that holds its lock."""
    while True:
        _refuse_existing(destination)
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{partial} cannot be made: {error.strerror}: give another folder") from error
        with suppress(FileNotFoundError):  # the other process has just ended, or given the folder its name
            return lock_of(partial, "is being written by another process: wait for it")


def _give_name(partial: Path, destination: Path) -> None:
    try:
        if os.path.lexists(destination):  # an empty folder would be replaced without a word
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        partial.rename(destination)
    except OSError as error:
        raise InputError(
            f"{partial} is complete, but cannot become {destination} ({error.strerror}): rename it yourself"
        ) from error


def _empty(folder: Path, keep: Iterable[str] = ()) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = nbytes + SPARE_BYTES
    if free < needed:
        raise InputError(
            f"{folder.parent} has {readable_size(free)} free, {readable_size(needed)} are needed:"
            " free some space or give another folder"
        )
