"""Prefect's temporary server: in a session of its own, and gone when the process that needs it is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import subprocess, sys, time
from flows.local_server import local_server
from prefect.client.orchestration import get_client
with local_server():
    with get_client(sync_client=True) as client:
        assert client.api_healthcheck() is None
    try:
        print(client.api_url.port, flush=True)
        time.sleep(300)
    except KeyboardInterrupt:
        with get_client(sync_client=True) as client:
            print(client.api_healthcheck(), flush=True)
"""


def server_on(port: str) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"create_app .*--port {port} "], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_outlives_ctrl_c_but_not_its_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    ports = []
    for end in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        ports.append(process.stdout.readline().strip())
        assert len(server_on(ports[-1])) == 1
        os.killpg(process.pid, end)
        rest, _ = process.communicate(timeout=120)
        # the whole group was interrupted, as by Ctrl-C, and the server still answered
        assert rest.strip() == ("None" if end == signal.SIGINT else "")
    deadline = time.monotonic() + 60
    while any(map(server_on, ports)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
