"""Jobs that crash are started again as a whole; verdicts, stops and bad input are not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.errors import ConfigError
from tasks.errors import JobCrashedError, JobError, JobStoppedError
from tasks.launch import launch
from tasks.restart import ATTEMPTS, run_with_restarts
from training.checkpoint_folders import folder_of

JOB = """
import os, signal
from pathlib import Path
from bridge.errors import GateError
from training.checkpoint_folders import folder_of, latest_complete

def main(config):
    folder = Path(config["output"])
    done = latest_complete(folder)
    rank = int(os.environ["RANK"])
    if config["do"] == "verdict":
        raise GateError("the loss is no number")
    if config["do"] == "saves" and done < 20:
        import torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()  # both have looked
        if rank == 0:
            folder_of(folder, done + 10).mkdir()
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
    if config["do"] == "never saves":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"iteration": done}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    (tmp_path / "frail_job.py").write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(do: str, max_restarts: int = 1) -> dict:
        config = {"do": do, "output": str(tmp_path)}
        return run_with_restarts(
            lambda name: launch("frail_job", config, folder=tmp_path / name, num_processes=2),
            checkpoints=tmp_path,
            folder=tmp_path,
            max_restarts=max_restarts,
            log=print,
        )

    return start


def attempts(folder: Path) -> list[tuple[int, int, str]]:
    found = json.loads((folder / ATTEMPTS).read_text())
    return [(each["from_iteration"], each["to_iteration"], each["outcome"]) for each in found]


def test_a_job_that_lost_a_rank_goes_on_from_its_checkpoint(run: Callable[..., dict], tmp_path: Path) -> None:
    """Two crashes with one restart allowed: each brought a new checkpoint."""
    report = run("saves", max_restarts=1)
    assert report["iteration"] == 20
    assert attempts(tmp_path) == [(0, 10, "crashed"), (10, 20, "crashed"), (20, 20, "done")]
    assert [each["number"] for each in report["attempts"]] == [1, 2, 3]
    assert all((tmp_path / name / "job.log").is_file() for name in ("job", "job-2", "job-3"))


def test_crashes_without_progress_end(run: Callable[..., dict], tmp_path: Path) -> None:
    with pytest.raises(JobCrashedError):
        run("never saves", max_restarts=1)
    assert attempts(tmp_path) == [(0, 0, "crashed")] * 2
    # the reason fits a line; what a person needs to see besides is there too
    first = json.loads((tmp_path / ATTEMPTS).read_text())[0]
    assert "JobCrashedError: frail_job ended by exit code 1" in first["reason"]
    assert "exitcode  : -9" in first["details"]


@pytest.mark.parametrize(("error", "starts"), [("KeyError: 'x'", 2), ("DistBackendError: NCCL", 4)])
def test_the_same_mistake_twice_is_the_end(error: str, starts: int, tmp_path: Path) -> None:
    """Errors of the machines may pass, those of the program do not."""

    def start(name: str) -> dict:
        raise JobCrashedError(f"frail_job failed with {error} (log: {tmp_path / name}.log); its last lines:")

    with pytest.raises(JobCrashedError):
        run_with_restarts(start, checkpoints=tmp_path, folder=tmp_path, max_restarts=3, log=print)
    assert attempts(tmp_path) == [(0, 0, "crashed")] * starts


def test_attempts_of_earlier_launchers_stay_on_record(tmp_path: Path) -> None:
    folder_of(tmp_path, 30).mkdir()
    names = []

    def start(name: str) -> dict:
        names.append(name)
        if len(names) == 1:
            raise JobStoppedError("told to")
        if len(names) == 2:
            # what a launcher leaves that is killed now
            assert attempts(tmp_path)[1] == (30, None, "running")
            shutil.copy(tmp_path / ATTEMPTS, tmp_path / "left")
        return {}

    def run() -> dict:
        return run_with_restarts(start, checkpoints=tmp_path, folder=tmp_path, max_restarts=5, log=print)

    with pytest.raises(JobStoppedError):
        run()
    run()
    (tmp_path / "left").replace(tmp_path / ATTEMPTS)
    report = run()
    assert attempts(tmp_path) == [(30, 30, "ended"), (30, None, "lost"), (30, 30, "done")]
    assert [each["number"] for each in report["attempts"]] == [1, 2, 3]
    assert names == ["job", "job-2", "job-3"]


def test_a_launcher_that_is_told_to_stop_says_so(tmp_path: Path) -> None:
    def start(name: str) -> dict:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run_with_restarts(start, checkpoints=tmp_path, folder=tmp_path, max_restarts=3, log=print)
    (attempt,) = json.loads((tmp_path / ATTEMPTS).read_text())
    assert attempt["reason"] == "its launcher was told to stop (SystemExit)"


def test_a_verdict_is_final(run: Callable[..., dict], tmp_path: Path) -> None:
    with pytest.raises(JobError, match="GateError: the loss is no number"):
        run("verdict")
    assert attempts(tmp_path) == [(0, 0, "ended")]


@pytest.mark.parametrize(
    "error", [JobStoppedError("told to"), ConfigError("no such setting"), JobError("slow")]
)
def test_stops_and_bad_input_are_passed_on(error: Exception, tmp_path: Path) -> None:
    folder_of(tmp_path, 30).mkdir()

    def start(name: str) -> dict:
        raise error

    with pytest.raises(type(error), match=str(error)):
        run_with_restarts(start, checkpoints=tmp_path, folder=tmp_path, max_restarts=5, log=print)
    assert attempts(tmp_path) == [(30, 30, "ended")]
