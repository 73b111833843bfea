"""Copies of byte ranges: exact at any offset, in bounded memory, and an error where a file ends early."""

import errno
import os
import random
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bridge.byte_copy import MAPPED_SIZE, OpenFiles, copy_range, read_into, reserve, write_from
from bridge.errors import CheckpointError


@pytest.mark.parametrize("start", [0, 1, 4095, MAPPED_SIZE - 3])
@pytest.mark.parametrize("nbytes", [0, 1, 4097, 2 * MAPPED_SIZE + 5])
def test_copies_any_range(start: int, nbytes: int, tmp_path: Path) -> None:
    data = os.urandom(4 * MAPPED_SIZE)
    (tmp_path / "source").write_bytes(data)
    target = os.open(tmp_path / "target", os.O_CREAT | os.O_WRONLY)
    with OpenFiles() as files:
        crc = copy_range(files.mapped(tmp_path / "source"), start, nbytes, target, 7, zlib.crc32(b"before"))
    os.close(target)
    wanted = data[start : start + nbytes]
    assert (tmp_path / "target").read_bytes()[7:] == wanted
    assert crc == zlib.crc32(b"before" + wanted)


def test_a_file_too_short_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(100))
    with OpenFiles() as files, pytest.raises(CheckpointError, match="ends at byte 100, in the middle"):
        copy_range(files.mapped(tmp_path / "source"), 50, 51, -1, 0)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    """In a process of its own, which a signal would end."""
    program = """
import os, sys
from bridge.byte_copy import OpenFiles, copy_range
source, target = sys.argv[1:]
with OpenFiles() as files:
    mapped = files.mapped(source)
    os.truncate(source, 1 << 20)
    copy_range(mapped, 0, 4 << 20, os.open(target, os.O_CREAT | os.O_WRONLY), 0)
"""
    (tmp_path / "source").write_bytes(bytes(4 << 20))
    paths = [str(tmp_path / "source"), str(tmp_path / "target")]
    ended = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "CheckpointError: a file became shorter while it was read: fetch it again" in ended.stderr


@pytest.mark.parametrize("nbytes", [200 << 20, 300_000])
def test_what_was_copied_is_not_resident(nbytes: int, tmp_path: Path) -> None:
    program = """
import os, sys
from bridge.byte_copy import OpenFiles, copy_range
from bridge.memory import peak_bytes
source, target, nbytes = *sys.argv[1:3], int(sys.argv[3])
before = peak_bytes()
with OpenFiles() as files:
    descriptor = os.open(target, os.O_CREAT | os.O_WRONLY)
    for start in range(0, 200 << 20, nbytes):
        copy_range(files.mapped(source), start, min(nbytes, (200 << 20) - start), descriptor, 0)
print(peak_bytes() - before)
"""
    with (tmp_path / "source").open("wb") as file:
        for _ in range(200):
            file.write(bytes(1 << 20))
    arguments = [str(tmp_path / "source"), str(tmp_path / "target"), str(nbytes)]
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert int(ended.stdout) < 8 << 20


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_error_of_the_target_is_the_one_that_is_raised(tmp_path: Path) -> None:
    """And nothing stays open, although its traceback has seen views of the mapped file."""
    (tmp_path / "source").write_bytes(bytes(2 * MAPPED_SIZE))
    before = open_descriptors()
    with (
        pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught,
        OpenFiles() as files,
        OpenFiles(os.O_WRONLY) as targets,
        targets.opened(Path("/dev/full")) as target,
    ):
        copy_range(files.mapped(tmp_path / "source"), 0, 2 * MAPPED_SIZE, target, 0)
    assert open_descriptors() == before
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_takes_the_space_first(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), 1 << 20)
        assert (tmp_path / "file").stat().st_size == 1 << 20
        assert (tmp_path / "file").stat().st_blocks * 512 >= 1 << 20


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="a file system of Linux, and a small one")
def test_too_little_space_is_an_error_before_a_byte_is_written() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            reserve(file.fileno(), 1 << 50)
        assert os.fstat(file.fileno()).st_size == 0


def test_a_larger_file_than_is_allowed_is_an_error_before_a_byte_is_written(tmp_path: Path) -> None:
    """In a process of its own, as a limit that was lowered stays low."""
    program = """
import os, resource, sys
from bridge.byte_copy import reserve
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
reserve(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), 1001)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert os.strerror(errno.EFBIG) in ended.stderr


def test_where_no_space_can_be_taken_nothing_is_done() -> None:
    reading, writing = os.pipe()
    reserve(writing, 1 << 20)  # a pipe has none
    os.set_blocking(reading, False)
    with pytest.raises(BlockingIOError):
        os.read(reading, 1)
    os.close(reading)
    os.close(writing)


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir() if path.exists()}


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads have files in use while others make room for theirs."""
    monkeypatch.setattr("bridge.byte_copy.MAX_OPEN", 3)
    data = {tmp_path / str(number): os.urandom(5000) for number in range(20)}
    for file in data:
        file.touch()

    def write_and_read(seed: int) -> None:
        order = random.Random(seed).sample(sorted(data), len(data))
        for file in order:
            with targets.opened(file) as target:
                write_from(target, data[file], 0)
                write_from(target, data[file][:1000], 0)
            found = bytearray(5000)
            with sources.opened(file) as descriptor:
                read_into(descriptor, [memoryview(found)], 0)
            assert found == sources.mapped(file)[:] == data[file]

    before = open_descriptors()
    with OpenFiles() as sources, OpenFiles(os.O_WRONLY) as targets, ThreadPoolExecutor(6) as pool:
        list(pool.map(write_and_read, range(30)))
        assert len(open_descriptors() - before) <= 6 + 6 + 3 + 1  # of this list itself
    assert open_descriptors() == before
