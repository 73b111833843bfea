"""What `bridgeworks train` says of a job that it was told to stop, by what that has left."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from flows.stop_request import StopRequest, noting_stops
from tasks.errors import JobSavedError, JobStoppedError
from training.checkpoint_folders import folder_of


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The folder of a job; its run has a checkpoint of iteration 20."""
    folder_of(tmp_path / "checkpoints", 20).mkdir(parents=True)
    (tmp_path / "job").mkdir()
    return tmp_path / "job"


def told_to_stop(grace: float) -> StopRequest:
    request = StopRequest(grace)
    request.note(signal.SIGTERM, None)
    with pytest.raises(JobStoppedError, match="SIGTERM"):
        request.check()
    return request


@pytest.mark.parametrize(
    ("report", "error", "message"),
    [
        (
            {"stopped": True, "iteration": 20},
            JobSavedError,
            r"SIGTERM: iteration 20 is saved in .*; the same",
        ),
        (
            {"error": {"type": "OSError", "message": "disk full"}},
            JobStoppedError,
            "failed with OSError: disk",
        ),
        (None, JobStoppedError, r"ended without saving, .* goes on from iteration 20"),
    ],
)
def test_what_a_stopped_job_has_left(job: Path, report: dict | None, error: type, message: str) -> None:
    if report:
        (job / "report.json").write_text(json.dumps(report))
    with pytest.raises(JobStoppedError, match=message) as caught:
        told_to_stop(60).outcome(job, job.parent / "checkpoints")
    assert type(caught.value) is error
    assert caught.value.exit_code == (75 if error is JobSavedError else 1)


def test_a_job_that_was_killed_needs_a_longer_grace(job: Path) -> None:
    request = told_to_stop(0.01)
    time.sleep(0.02)
    with pytest.raises(JobStoppedError, match=r"not saved after 0\.01 seconds and was killed, --grace gives"):
        request.outcome(job, job.parent / "checkpoints")


def test_a_job_that_had_done_everything_is_done(job: Path) -> None:
    report = {"stopped": False, "iteration": 20}
    (job / "report.json").write_text(json.dumps(report))
    assert told_to_stop(60).outcome(job, job.parent / "checkpoints") == report


def test_only_a_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with noting_stops(60) as request:
        request.check()
        for number in (signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        with pytest.raises(JobStoppedError):
            request.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
