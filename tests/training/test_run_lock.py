import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge import distributed
from bridge.errors import InputError
from training import run_lock
from training.run_lock import sole_run

# a run, and a fork of it that outlives it for a second
HOLDER = """
import os, sys, time
from pathlib import Path
from bridge.folder_lock import locked
Path(sys.argv[1]).mkdir()
with locked(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.start_process_group()
    yield
    distributed.finalize()


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen]:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run"), "1"],
        env={**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_run_is_refused(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)
    with (
        pytest.raises(InputError, match=r"run gets the checkpoints of another run"),
        sole_run(str(tmp_path / "run")),
    ):
        pytest.fail("entered")


def test_the_forks_of_a_killed_run_are_waited_for(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with sole_run(str(tmp_path / "run")):
        pass


def test_forks_do_not_keep_the_lock_of_a_run_that_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    with sole_run(str(tmp_path / "run")):
        fork = subprocess.Popen(["sleep", "300"], pass_fds=descriptors_of(tmp_path / "run"))
    try:
        with sole_run(str(tmp_path / "run")):
            assert fork.poll() is None
    finally:
        fork.kill()
        fork.wait()


def descriptors_of(folder: Path) -> list[int]:
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [int(path.name) for path in links if path.readlink() == folder]


def test_a_run_without_checkpoints_needs_no_lock():
    with sole_run(None):
        pass
