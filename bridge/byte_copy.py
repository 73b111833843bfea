"""Copies byte ranges between files with a few threads, in memory that does not depend on their sizes."""

import ctypes
import errno
import mmap
import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from bridge.errors import CheckpointError

try:
    from zlib_ng.zlib_ng import crc32  # by the processor's own instructions: measured 80 GB/s, zlib 5 GB/s
except ImportError:  # a machine without our dependencies, such as a GPU image: the same numbers, slower
    from zlib import crc32

# Measured: at 1 MiB the buffer leaves the processor's cache and a copy with CRC runs at 0.6 of the speed.
BUFFER_SIZE = 512 * 1024
# Of a mapped file, written at once. Measured: 128 KiB take a third longer, and so do 512 KiB; 1 MiB takes up
# to twice as long.
WRITE_SIZE = 256 * 1024
MAPPED_SIZE = 2 * 1024 * 1024  # of a mapped file, forgotten at once: the most that one page fault maps
MAX_VIEWS = 1024  # IOV_MAX of Linux: the most buffers that one preadv fills
MAX_OPEN = 256  # files; fewer where the process may open few

_libc = ctypes.CDLL(None, use_errno=True)

Item = TypeVar("Item")
Progress = Callable[[int, int], None]


@dataclass
class _OpenFile:
    descriptor: int
    users: int = 0


class OpenFiles:
    """Files opened for reading or for writing, each once; the `with` block's end closes them.

    A checkpoint may have more files than a process may open: the ones that were not used for the longest time
    are closed, and opened again when they are asked for.
    """

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._flags = flags
        self._limit = _most_open()
        self._open: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._mapped: OrderedDict[Path, mmap.mmap] = OrderedDict()
        self._lock = threading.RLock()

    @contextmanager
    def opened(self, file: Path) -> Iterator[int]:
        """Yield a descriptor that stays open until the block ends."""
        used = self._take(file)
        try:
            yield used.descriptor
        finally:
            with self._lock:
                used.users -= 1

    def _take(self, file: Path) -> _OpenFile:
        with self._lock:
            if file not in self._open:
                self._make_room()
                self._open[file] = _OpenFile(os.open(file, self._flags))
            self._open.move_to_end(file)
            self._open[file].users += 1
            return self._open[file]

    def _make_room(self) -> None:
        if len(self._open) >= self._limit:
            idle = [file for file, each in self._open.items() if not each.users]
            for file in idle[: len(self._open) - self._limit + 1]:
                os.close(self._open.pop(file).descriptor)

    def mapped(self, file: Path) -> mmap.mmap:
        """Return a file's bytes, mapped as long as someone holds them."""
        with self._lock:
            if file not in self._mapped:
                if len(self._mapped) >= self._limit:
                    self._mapped.popitem(last=False)
                self._mapped[file] = self._map(file)
            self._mapped.move_to_end(file)
            return self._mapped[file]

    def _map(self, file: Path) -> mmap.mmap:
        with self.opened(file) as descriptor:
            if not os.fstat(descriptor).st_size:  # which cannot be mapped
                raise _ends_early(0)
            return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for mapped in self._mapped.values():
            with suppress(BufferError):  # an error's traceback may hold a view of it: it goes with that
                mapped.close()
        for each in self._open.values():
            os.close(each.descriptor)


def _most_open() -> int:
    """Leave most of the descriptors that the process may have to others, other `OpenFiles` among them."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN if allowed == resource.RLIM_INFINITY else min(MAX_OPEN, max(2, allowed // 8))


class ThreadBuffer(threading.local):
    """A buffer of each thread's own, used again for every copy."""

    def __init__(self, size: int = BUFFER_SIZE) -> None:
        self.view = memoryview(bytearray(size))


def read_into(descriptor: int, views: list[memoryview], offset: int) -> None:
    """Fill `views` in turn with the bytes from `offset` on; fewer bytes are a CheckpointError."""
    if len(views) == 1 and os.preadv(descriptor, views, offset) == views[0].nbytes:
        return
    while views:
        count = os.preadv(descriptor, views[:MAX_VIEWS], offset)
        if count == 0:
            raise _ends_early(offset)
        offset += count
        views = _without(views, count)


def _without(views: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of `views` after their first `count` bytes."""
    for number, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[number + 1 :]]
        count -= view.nbytes
    return []


def reserve(descriptor: int, nbytes: int) -> None:
    """Take the space for a file of `nbytes` bytes at once, where the file system can.

    Measured: threads that find the space taken write a file a tenth faster. `os.posix_fallocate` would write
    into every block where the file system cannot.
    """
    if sys.platform == "linux" and _libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        error = ctypes.get_errno()
        if error in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # others: it cannot, or not for such a file
            raise OSError(error, os.strerror(error))


def write_from(descriptor: int, view: memoryview | bytes, offset: int) -> None:
    """Write all bytes of `view` at `offset`."""
    written = os.pwrite(descriptor, view, offset)
    if written == len(view):
        return
    with memoryview(view) as whole:
        while written < len(whole):
            # Released at once: what is in the traceback of an error would keep a mapped file from closing.
            with whole[written:] as rest:
                written += os.pwrite(descriptor, rest, offset + written)


def copy_range(source: mmap.mmap, start: int, nbytes: int, target: int, position: int, crc: int = 0) -> int:
    """Copy `nbytes` bytes of a mapped file; return their CRC-32, continued from `crc`.

    A file with fewer bytes is a CheckpointError. Mapping saves one of two copies: measured, 0.56 s instead of
    0.72 s for 3.2 GB. What was written is forgotten at once, so that it does not count as resident memory: by
    blocks of the file, because the kernel maps the pages around one that is asked for as well.
    """
    end = start + nbytes
    if end > len(source):
        raise _ends_early(len(source))
    with memoryview(source) as whole:
        while start < end:
            block = start - start % MAPPED_SIZE
            last = min(block + MAPPED_SIZE, end)
            crc = _copy_block(whole, start, last, target, position, crc)
            source.madvise(mmap.MADV_DONTNEED, block, MAPPED_SIZE)
            start, position = last, position + last - start
    return crc


def _copy_block(source: memoryview, start: int, end: int, target: int, position: int, crc: int) -> int:
    for first in range(start, end, WRITE_SIZE):
        with source[first : min(first + WRITE_SIZE, end)] as view:
            # The write comes first. Where the file has become shorter since it was mapped, the kernel
            # reports that to a write, while the first look of our own would end the process (SIGBUS).
            _write_mapped(target, view, position + first - start)
            crc = crc32(view, crc)
    return crc


def _write_mapped(target: int, view: memoryview, position: int) -> None:
    try:
        write_from(target, view, position)
    except OSError as error:
        if error.errno == errno.EFAULT:
            raise CheckpointError("a file became shorter while it was read: fetch it again") from error
        raise


def _ends_early(size: int) -> CheckpointError:
    return CheckpointError(f"a file ends at byte {size}, in the middle of a tensor: fetch it again")


class ProgressCounter:
    """Adds up what several threads have done and reports it to one callback, in order."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self.total, self.done, self.resumed, self._report = total, 0, 0, report
        self._lock = threading.Lock()

    def start(self, count: int) -> None:
        """Count what an earlier process has done already."""
        self.resumed = count
        if count:
            self.add(count)

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            if self._report:
                self._report(self.done, self.total)


def for_each(work: Callable[[Item], None], items: Iterable[Item], workers: int) -> None:
    """Do `work` on every item in `workers` threads; the first error stops the items not yet begun."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="copy")
    try:
        finished, _ = wait([pool.submit(work, item) for item in items], return_when=FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)
        for future in finished:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
