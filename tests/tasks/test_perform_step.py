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


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def ranks(workspace: Path) -> list[int]:
    return [int(text) for path in workspace.glob("rank?") if (text := path.read_text())]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_in_process(workspace: Path, job: str) -> subprocess.Popen:
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "small_flow.py"), str(workspace), job], env=environment
    )
    wait_for(lambda: len(ranks(workspace)) == 2)
    assert all(map(alive, ranks(workspace)))
    return process


def test_second_run_reuses_and_shows_as_cached(tmp_path) -> None:
    spec = spec_for(tmp_path, "finish")
    assert small_flow(spec) == ["run", "run"]
    first = flow_run_id(tmp_path)
    assert small_flow(spec) == ["reuse", "reuse"]
    with get_client(sync_client=True) as client:
        names = [
            run.state.name for run in client.read_task_runs() if run.flow_run_id == flow_run_id(tmp_path)
        ]
        assert names == ["Cached", "Cached"]
        of_first = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[first]))
        kinds = {artifact.key: artifact.type for artifact in client.read_artifacts(artifact_filter=of_first)}
        assert kinds == {"small-files": "table", "small-work": "progress"}

        def logged() -> bool:
            logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[first])))
            return any("worked hard" in log.message for log in logs)

        wait_for(logged, 20)


def test_failing_job_fails_the_flow_with_its_message(tmp_path) -> None:
    (tmp_path / "rank0").mkdir()
    with pytest.raises(Exception, match="small_flow failed with IsADirectoryError"):
        small_flow(spec_for(tmp_path, "finish"))
    assert read_flow_run(tmp_path).state.type == StateType.FAILED


def test_cancelling_a_local_run_stops_its_job(tmp_path) -> None:
    process = start_in_process(tmp_path, "stubborn")
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id(tmp_path), Cancelling())
    process.wait(60)
    assert not any(map(alive, ranks(tmp_path)))
    assert read_flow_run(tmp_path).state.type == StateType.CANCELLED


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_to_the_flow_leaves_no_rank(tmp_path, signal_number) -> None:
    process = start_in_process(tmp_path, "stubborn")
    process.send_signal(signal_number)
    process.wait(60)
    wait_for(lambda: not any(map(alive, ranks(tmp_path))), 10)
    assert not list(tmp_path.glob("store/work/*/artifact.json"))
