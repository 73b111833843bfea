"""The record in a real MLflow store, and what happens when there is none."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from mlflow import MlflowClient

from tasks.errors import StoreError
from tasks.lineage import Metric, MlflowLineage, without_password

DIGEST = "d" * 64
LONGEST = 240  # seconds, to end a hang; a new store takes seconds on an idle machine


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def recorded(workspace) -> tuple[MlflowClient, MlflowLineage, str]:
    lineage = MlflowLineage("tiny", workspace, {"git.commit": "abc", "none": None})
    step = lineage.start_step("train", {"reason": "not built yet"})
    step.log_params({f"setting{number}": number for number in range(150)})
    points = [Metric("loss", 1 / (number + 1), number, 1.7e9 + number) for number in range(1500)]
    step.log_metrics(points)
    step.log_metrics(points[:10])  # delivered twice: changes nothing
    step.log_input("source", "hf://organisation/name@abc", DIGEST)
    versions = [
        lineage.register_model("tiny", "s3://b/p", DIGEST, "released", {"k": "v"}, timeout=LONGEST)
        for _ in range(2)
    ]
    assert versions == ["1", "1"]
    step.set_tags({"artifact.path": "/somewhere"})
    (workspace / "differences.png").write_bytes(b"a picture")
    step.log_file(workspace / "differences.png")
    step.finish("FINISHED")
    assert lineage.finish("FINISHED", timeout=LONGEST) == []
    return MlflowClient(lineage.uri), lineage, step.run_id


def test_identifiers_need_no_wait_after_the_end(recorded) -> None:
    started = time.monotonic()
    assert recorded[1].identifiers["run_id"] == recorded[1].run_id
    assert time.monotonic() - started < 10  # of the 15 seconds that it may wait


def test_parent_and_child_runs(recorded) -> None:
    client, lineage, child_id = recorded
    parent, child = client.get_run(lineage.run_id), client.get_run(child_id)
    assert parent.data.tags["kind"] == "pipeline"
    assert "none" not in parent.data.tags
    assert child.data.tags["mlflow.parentRunId"] == lineage.run_id
    assert child.data.tags["artifact.path"] == "/somewhere"
    assert {parent.info.status, child.info.status} == {"FINISHED"}
    assert len(child.data.params) == 150
    assert [file.path for file in client.list_artifacts(child_id)] == ["differences.png"]


def test_every_point_of_a_curve_once(recorded) -> None:
    client, _, child_id = recorded
    history = client.get_metric_history(child_id, "loss")
    assert [point.step for point in sorted(history, key=lambda point: point.step)] == list(range(1500))


def test_inputs_are_references(recorded) -> None:
    client, _, child_id = recorded
    [entry] = client.get_run(child_id).inputs.dataset_inputs
    assert entry.dataset.name == "source"
    assert {tag.key: tag.value for tag in entry.tags}["digest"] == DIGEST


def test_model_is_registered_by_reference(recorded, workspace) -> None:
    client, lineage, _ = recorded
    version = client.get_model_version_by_alias("tiny", "released")
    assert version.tags["uri"] == "s3://b/p"
    assert version.run_id == lineage.run_id
    assert sum(file.stat().st_size for file in workspace.rglob("mlruns/**/*") if file.is_file()) < 10_000


def test_nothing_global_is_changed(recorded) -> None:
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_refused_model_is_an_error(workspace, recorded) -> None:
    lineage = MlflowLineage("tiny", workspace, {})
    with pytest.raises(StoreError, match="reserved"):
        lineage.register_model("tiny", "/x", DIGEST, "latest", {}, timeout=LONGEST)
    lineage.finish("FAILED")


@pytest.fixture
def server(tmp_path, mlflow_store, monkeypatch) -> Iterator[str]:
    store = shutil.copyfile(mlflow_store, tmp_path / "server.db")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--backend-store-uri", f"sqlite:///{store}"],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        start_new_session=True,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(LONGEST)


def wait_until_healthy(uri: str) -> None:
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{uri}/health").is_success:
                return
        time.sleep(0.2)
    pytest.fail("no MLflow server")


def test_a_server_takes_references_too(server, tmp_path) -> None:
    lineage = MlflowLineage("tiny", tmp_path, {})
    for name, address in (("folder", "/a/folder"), ("bucket", "s3://bucket/prefix")):
        assert lineage.register_model(name, address, DIGEST, "released", {}, timeout=LONGEST) == "1"
        assert MlflowClient(server).get_model_version_by_alias(name, "released").tags["uri"] == address
    assert lineage.finish("FINISHED", timeout=LONGEST) == []


def test_dead_server_holds_nobody_up(tmp_path, monkeypatch) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{taken.getsockname()[1]}")
        started = time.monotonic()
        lineage = MlflowLineage("tiny", tmp_path, {})
        lineage.start_step("train", {}).log_metrics([Metric("loss", 1.0, 1, 1.0)])
        assert lineage.register_model("tiny", "/x", DIGEST, "released", {}, timeout=1) is None
        [problem] = lineage.finish("FINISHED", timeout=3)
        assert time.monotonic() - started < 30  # MLflow's own patience is minutes
    assert "1 metrics of train" in problem
    assert "hunter2" not in problem


def test_two_that_open_a_new_store_at_once(tmp_path) -> None:
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda name: MlflowLineage(name, tmp_path, {}), ("one", "two")))
    assert [lineage.finish("FINISHED", timeout=LONGEST) for lineage in both] == [[], []]


def test_password_is_left_out() -> None:
    assert without_password("https://user:secret@host/path") == "https://host/path"
    assert without_password("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"
