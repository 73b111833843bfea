"""Jobs that crash are started again as a whole; verdicts, stops and bad input are not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.errors import ConfigError
from bridge.megatron_checkpoint import LATEST
from tasks.errors import JobCrashedError, JobError, JobStoppedError
from tasks.launch import launch
from tasks.restart import ATTEMPTS, run_with_restarts

JOB = """
import os, signal
from pathlib import Path
from bridge.errors import GateError

def main(config):
    folder = Path(config["output"])
    latest = folder / "latest_checkpointed_iteration.txt"
    done = int(latest.read_text()) if latest.is_file() else 0
    rank = int(os.environ["RANK"])
    if config["do"] == "verdict":
        raise GateError("the loss is no number")
    if config["do"] == "saves" and done < 20:
        import torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()  # both have read the file
        if rank == 0:
            latest.write_text(str(done + 10))
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


def test_a_verdict_is_final(run: Callable[..., dict], tmp_path: Path) -> None:
    with pytest.raises(JobError, match="GateError: the loss is no number"):
        run("verdict")
    assert attempts(tmp_path) == [(0, 0, "ended")]


@pytest.mark.parametrize(
    "error", [JobStoppedError("told to"), ConfigError("no such setting"), JobError("slow")]
)
def test_stops_and_bad_input_are_passed_on(error: Exception, tmp_path: Path) -> None:
    (tmp_path / LATEST).write_text("30\n")

    def start(name: str) -> dict:
        raise error

    with pytest.raises(type(error), match=str(error)):
        run_with_restarts(start, checkpoints=tmp_path, folder=tmp_path, max_restarts=5, log=print)
    assert attempts(tmp_path) == [(30, 30, "ended")]
