"""The deployment on a real Prefect server with a real process worker, started by a request to its API."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from s3_server import BUCKET, s3, s3_server

from tasks.audit import verify_release

ROOT = Path(__file__).resolve().parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))


@contextmanager
def process(log: Path, *command: str, **environment: str) -> Iterator[None]:
    """Run a program in a process group of its own, all of which ends with the body."""
    with log.open("w") as output:
        started = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)


def wait_for(what: str, ready: Any, seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := ready():
            return value
        time.sleep(0.3)
    raise AssertionError(f"{what}: not within {seconds} s")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a server with a database of its own and return what its clients need."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PWD": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    server = ("server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui")
    with process(home / "server.log", PREFECT, *server, **environment):
        wait_for("server", lambda: answers(environment["PREFECT_API_URL"]), 120)
        yield environment


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


def prefect(environment: dict[str, str], *arguments: str) -> None:
    done = subprocess.run(
        [PREFECT, "--no-prompt", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def deployment(environment: dict[str, str]) -> Iterator[tuple[httpx.Client, dict[str, Any]]]:
    """Deploy as the file says and return a client of the API and the deployment as the server has it."""
    prefect(environment, "work-pool", "create", "bridgeworks", "--type", "process")
    prefect(environment, "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    with httpx.Client(base_url=environment["PREFECT_API_URL"], timeout=30) as client:
        yield client, client.get("/deployments/name/release-model/release-model").raise_for_status().json()


def start(client: httpx.Client, deployment: dict[str, Any], spec: dict[str, Any]) -> httpx.Response:
    return client.post(
        f"/deployments/{deployment['id']}/create_flow_run", json={"parameters": {"spec": spec}}
    )


def test_the_form_is_typed_and_bounded(deployment: tuple[httpx.Client, dict[str, Any]]) -> None:
    client, deployed = deployment
    definitions = deployed["parameter_openapi_schema"]["definitions"]
    assert definitions["DType"]["enum"] == ["float32", "bfloat16"]
    assert definitions["ParallelSpec"]["properties"]["tensor_model_parallel_size"]["minimum"] == 1
    described = [
        field for section in definitions.values() for field in section.get("properties", {}).values()
    ]
    assert all("description" in field or "$ref" in field or "allOf" in field for field in described)
    spec = deployed["parameters"]["spec"]
    for section, wrong in (
        ("check", {"num_prompts": 0}),
        ("check", {"dtype": "int8"}),
        ("train", {"recipes": "x"}),
    ):
        assert start(client, deployed, {**spec, section: wrong}).status_code in (409, 422)
    assert start(client, deployed, {"name": "no-source"}).status_code in (409, 422)


def test_the_schedule_is_nightly(deployment: tuple[httpx.Client, dict[str, Any]]) -> None:
    (schedule,) = deployment[1]["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "0 3 * * *"
    assert schedule["parameters"] == deployment[1]["parameters"]


def test_a_run_started_through_the_api_completes(
    deployment: tuple[httpx.Client, dict[str, Any]],
    environment: dict[str, str],
    small_release: Path,
    tmp_path: Path,
) -> None:
    client, deployed = deployment
    spec = yaml.safe_load(small_release.read_text())
    folder = small_release.parent
    spec |= {"workspace": str(folder), "source": {"uri": str(folder / "source")}}
    spec["dataset"]["inputs"] = [str(folder / "text")]
    spec["publish"]["destination"] = f"s3://{BUCKET}/small/{{digest}}"
    worker = ("worker", "start", "--pool", "bridgeworks", "--limit", "1")
    with s3_server():
        credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        with process(tmp_path / "worker.log", PREFECT, *worker, **environment, **credentials):
            run_id = start(client, deployed, spec).raise_for_status().json()["id"]
            state = wait_for("run", lambda: final_state(client, run_id), 240)
        assert state["type"] == "COMPLETED", (state, (tmp_path / "worker.log").read_text())
        (published,) = [place for place in s3().find(f"{BUCKET}/small") if place.endswith("release.json")]
        assert verify_release(f"s3://{published.rpartition('/')[0]}") == []
    tasks = client.post("/task_runs/filter", json={"flow_runs": {"id": {"any_": [run_id]}}}).json()
    states = {task["name"].rpartition("-")[0]: task["state"]["name"] for task in tasks}
    assert states["publish"] == "Completed"
    assert states["train"] == "Cached"


def final_state(client: httpx.Client, run_id: str) -> dict[str, Any] | None:
    state = client.get(f"/flow_runs/{run_id}").raise_for_status().json()["state"]
    return state if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None
