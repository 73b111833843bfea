"""Prefect's temporary server, for a flow in this process where no server is configured.

Prefect would start one by itself, but in our process group and bound to nothing: Ctrl-C would end it before
the flow can report its own end, for minutes of retries, and a killed flow would leave it behind.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tasks.errors import StoreError
from tasks.launch import dying_with_this_process

POLL_SECONDS = 0.1
STOP_SECONDS = DRAIN_SECONDS = 5.0
LOG = "bridgeworks-server.log"


@contextmanager
def local_server() -> Iterator[None]:
    """Run a server while the body runs, in a session of its own; do nothing where one is configured."""
    from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

    settings = get_current_settings()
    if settings.api.url:
        yield
        return
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    settings.home.mkdir(parents=True, exist_ok=True)
    server = _start(port, settings.home / LOG, settings.to_environment_variables(exclude_unset=True))
    try:
        _wait_until_healthy(
            url, server, settings.home / LOG, settings.server.ephemeral.startup_timeout_seconds
        )
        with temporary_settings({PREFECT_API_URL: url}):
            try:
                yield
            finally:
                _send_what_is_queued()
    finally:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _send_what_is_queued() -> None:
    """Let Prefect's threads deliver logs and states; later they would try in vain for minutes."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=DRAIN_SECONDS)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _start(port: int, log: Path, settings: dict[str, str]) -> subprocess.Popen[bytes]:
    # as prefect.server.api.server.SubprocessASGIServer does
    marks = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, *options],
            env={**os.environ, **settings, **marks},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=dying_with_this_process(),
        )


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.HTTPError:  # not listening yet
            time.sleep(POLL_SECONDS)
    raise StoreError(f"Prefect's temporary server did not start within {seconds:g} seconds: see {log}")
