"""The launcher with real processes: reports, errors, logs, and that nothing is ever left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from bridge.errors import InputError
from bridge.job import MARK, die_with_parent
from tasks.errors import JobError, JobStoppedError
from tasks.launch import halt_jobs, job_guard, launch

JOBS = """
import os, signal, sys, time
from pathlib import Path
from bridge.errors import CheckpointError

def ready(config):
    Path(config["output"], f"rank{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))

def sleep_forever(config):
    ready(config)
    while True:
        time.sleep(0.05)

def main(config):
    return globals()[config["do"]](config)

def greet(config):
    print("hello", "world", os.environ["OMP_NUM_THREADS"])
    return {"rank": os.environ.get("RANK"), "world": os.environ.get("WORLD_SIZE")}

def count(config):
    ready(config)
    while len(list(Path(config["output"]).glob("rank?"))) < 2:
        pass
    for i in range(2000):
        print("line", i, "of rank", os.environ["RANK"])

def refuse(config):
    raise CheckpointError("no such shard")

def crash(config):
    print("about to crash")
    raise ZeroDivisionError("by nought")

def vanish(config):
    print("last words")
    os.kill(os.getpid(), signal.SIGKILL)

def stubborn(config):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep_forever(config)

def writes(config):
    if os.environ.get("RANK") == "1":  # as Megatron's checkpoint writer, which forks
        if child := os.fork():
            Path(config["output"], "rank2").write_text(str(child))
        else:
            time.sleep(1000)
    stubborn(config)

def saves(config):
    def save(*_):
        time.sleep(1)
        Path(config["output"], "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    sleep_forever(config)
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable:
    (tmp_path / "tiny_job.py").write_text(JOBS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(do, **options) -> dict:
        config = {"do": do, "output": str(tmp_path)}
        return launch("tiny_job", config, folder=tmp_path / "run", **options)

    return start


def alive(folder: Path) -> list[int]:
    """The ranks that said they were ready and still run."""
    pids = [int(path.read_text()) for path in folder.glob("rank?")]
    return [pid for pid in pids if state_and_parent(pid)[0] not in "XZ"]


def state_and_parent(pid: int) -> tuple[str, int]:
    """Return the kernel's letter for what a process is at and its parent; X, dead, for one that is gone."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return state, int(parent)


def wait_for(condition, seconds=120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def ranks_ready(folder: Path, count: int) -> Callable:
    return lambda: len([path for path in folder.glob("rank?") if path.read_text()]) == count


def test_report_log_and_config_are_kept(run, tmp_path) -> None:
    lines = []
    report = run("greet", on_line=lines.append)
    assert report == {"rank": None, "world": None}
    assert [line.split()[:2] for line in lines] == [["hello", "world"]]
    assert (tmp_path / "run" / "job.log").read_text().startswith("hello world")
    assert json.loads((tmp_path / "run" / "job.json").read_text())["do"] == "greet"


def test_environment_is_not_written_down(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    run("greet")
    assert not any("hunter2" in path.read_text() for path in (tmp_path / "run").iterdir())


def test_two_ranks_share_the_cores(run, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    lines = []
    assert run("greet", num_processes=2, on_line=lines.append) == {"rank": "0", "world": "2"}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert lines.count(f"hello world {threads}") == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_of_ranks_do_not_mix(unbuffered, run, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    lines = []
    run("count", num_processes=2, on_line=lines.append)
    said = [line for line in lines if "of rank" in line]
    assert sorted(said) == sorted(f"line {i} of rank {rank}" for rank in "01" for i in range(2000))


def test_refused_input_passes_through(run) -> None:
    with pytest.raises(InputError, match=r"^no such shard$"):
        run("refuse")


def test_error_names_cause_and_log(run, tmp_path) -> None:
    with pytest.raises(JobError, match=r"ZeroDivisionError: by nought \(log: .*job.log\)"):
        run("crash")
    assert "about to crash" in (tmp_path / "run" / "job.log").read_text()


def test_killed_job_shows_its_last_lines(run) -> None:
    with pytest.raises(JobError, match=r"SIGKILL(.|\n)*last words"):
        run("vanish")


def test_too_slow_job_is_stopped(run, tmp_path) -> None:
    with pytest.raises(JobError, match="longer than 2 seconds"):
        run("sleep_forever", timeout=2, grace=5)
    assert alive(tmp_path) == []


def test_a_stopped_job_may_save(run, tmp_path) -> None:
    ready = ranks_ready(tmp_path, 1)
    with pytest.raises(JobError, match="longer than"):
        run("saves", timeout=1, grace=120, on_tick=lambda: wait_for(ready))
    assert (tmp_path / "saved").exists()


def test_ranks_that_ignore_sigterm_are_killed(run, tmp_path) -> None:
    ready = ranks_ready(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        run(
            "stubborn",
            num_processes=2,
            grace=2,
            on_tick=lambda: ready() and signal.raise_signal(signal.SIGINT),
        )
    assert len(list(tmp_path.glob("rank?"))) == 2
    assert alive(tmp_path) == []


def test_dead_agent_fails_the_job_and_leaves_no_rank(run, tmp_path) -> None:
    ready, killed = ranks_ready(tmp_path, 2), set()

    def kill_agent() -> None:
        if ready() and not killed:  # later the parent of a rank is another one than the agent
            killed.update(state_and_parent(pid)[1] for pid in alive(tmp_path))
            (agent,) = killed
            os.kill(agent, signal.SIGKILL)

    with pytest.raises(JobError, match="SIGKILL"):
        run("sleep_forever", num_processes=2, grace=2, on_tick=kill_agent)
    wait_for(lambda: alive(tmp_path) == [])


def test_halt_reaches_a_job_in_a_thread(run, tmp_path) -> None:
    raised = []

    def work() -> None:
        try:
            run("sleep_forever", grace=5)
        except JobStoppedError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(ranks_ready(tmp_path, 1))
    with pytest.raises(RuntimeError), job_guard():
        raise RuntimeError("the flow was signalled")
    thread.join(120)
    assert raised
    assert alive(tmp_path) == []
    halt_jobs()  # nothing runs: no effect


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_signal_to_the_launcher_leaves_no_rank(run, tmp_path, signal_number) -> None:
    program = (
        "from pathlib import Path; from tasks.launch import launch;"
        f"p = Path({str(tmp_path)!r});"
        "launch('tiny_job', {'do': 'writes', 'output': str(p)}, folder=p / 'run', num_processes=2, grace=1)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program])
    wait_for(ranks_ready(tmp_path, 3))
    assert len(alive(tmp_path)) == 3
    launcher.send_signal(signal_number)
    launcher.wait(120)
    wait_for(lambda: alive(tmp_path) == [])


def test_mark_is_no_secret(run) -> None:
    assert MARK not in os.environ


@pytest.mark.parametrize("launched", [True, False])
def test_ranks_of_the_launcher_end_under_process_1(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchrun that is process 1, as in a container, is no agent that has gone."""
    ended: list[int] = []
    monkeypatch.setattr("bridge.job._libc", Mock())
    monkeypatch.setattr("os.getppid", lambda: 1)
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv(MARK, raising=False)
    if launched:
        monkeypatch.setenv(MARK, "7")
    die_with_parent()
    assert ended == [1] * launched


def test_what_a_parent_has_left_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent may end before its child asks to end with it."""
    ended: list[int] = []
    monkeypatch.setattr("bridge.job._libc", Mock())
    monkeypatch.setattr("os._exit", ended.append)
    die_with_parent(os.getppid())
    assert ended == []
    die_with_parent(os.getpid())
    assert ended == [1]
