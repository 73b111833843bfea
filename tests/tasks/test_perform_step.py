"""A step inside Prefect: reuse, logs, progress, tables, cancelling, and that no rank outlives its flow."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling

from tasks.perform_step import watcher
from tests.tasks.small_flow import small_flow, spec_for

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(autouse=True)
def _jobs_find_their_module(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def flow_run_id(workspace: Path) -> UUID:
    return UUID((workspace / "flow_run_id").read_text())


def read_flow_run(workspace: Path) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run_id(workspace))


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def ranks(workspace: Path) -> list[int]:
    return [int(text) for path in workspace.glob("rank?") if (text := path.read_text())]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start_in_process(workspace: Path, job: str) -> subprocess.Popen:
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "small_flow.py"), str(workspace), job], env=environment
    )
    wait_for(lambda: len(ranks(workspace)) == 2)
    assert all(map(alive, ranks(workspace)))
    return process


def test_second_run_reuses_and_shows_as_cached(workspace) -> None:
    spec = spec_for(workspace, "finish")
    assert small_flow(spec) == ["run", "run"]
    first = flow_run_id(workspace)
    assert small_flow(spec) == ["reuse", "reuse"]
    second = flow_run_id(workspace)
    with get_client(sync_client=True) as client:

        def states() -> list[str]:  # of task runs, which reach the server as events, a little later
            return [
                run.state.name for run in client.read_task_runs() if run.flow_run_id == second and run.state
            ]

        wait_for(lambda: states() == ["Cached", "Cached"])
        of_first = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[first]))
        kinds = {artifact.key: artifact.type for artifact in client.read_artifacts(artifact_filter=of_first)}
        assert kinds == {"small-files": "table", "small-work": "progress"}

        def logged() -> bool:
            logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[first])))
            return any("worked hard" in log.message for log in logs)

        wait_for(logged)


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def decided(self, decision) -> None:
        self.told.append(("decided", decision.step, decision.action))

    def line(self, step, text) -> None:
        self.told.append(("line", step, text))

    def progressed(self, step, done, total, description) -> None:
        self.told.append(("progressed", step, done, total, description))

    def finished(self, step, artifact, seconds) -> None:
        self.told.append(("finished", step, artifact.step))


def test_a_watcher_in_this_process_is_told(workspace) -> None:
    notes = Notes()
    token = watcher.set(notes)
    try:
        small_flow(spec_for(workspace, "finish"))
    finally:
        watcher.reset(token)
    assert notes.told[:2] == [("decided", "prepare", "run"), ("finished", "prepare", "prepare")]
    assert ("progressed", "work", 1, 2, "half of it") in notes.told
    assert ("line", "work", "worked hard") in notes.told
    assert notes.told[-1] == ("finished", "work", "work")


def test_failing_job_fails_the_flow_with_its_message(workspace) -> None:
    (workspace / "rank0").mkdir()
    with pytest.raises(Exception, match="small_flow failed with IsADirectoryError"):
        small_flow(spec_for(workspace, "finish"))
    assert read_flow_run(workspace).state.type == StateType.FAILED


def test_cancelling_a_local_run_stops_its_job(workspace) -> None:
    process = start_in_process(workspace, "stubborn")
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id(workspace), Cancelling())
    process.wait(240)
    assert not any(map(alive, ranks(workspace)))
    assert read_flow_run(workspace).state.type == StateType.CANCELLED


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_to_the_flow_leaves_no_rank(workspace, signal_number) -> None:
    process = start_in_process(workspace, "stubborn")
    process.send_signal(signal_number)
    process.wait(240)
    wait_for(lambda: not any(map(alive, ranks(workspace))))
    assert not list(workspace.glob("store/work/*/artifact.json"))
