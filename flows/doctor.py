"""Whether this machine can do the work: one finding each, with what to do about it."""

import http.client
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

OK, WARNING, MISSING = "ok", "warning", "missing"
DISK_BYTES = 10 << 30
SECONDS = 5
# what torch sees, asked of a process of its own: this one stays free of torch
TORCH_PROBE = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.device_count())"
CREDENTIALS = {
    "S3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_PROFILE",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
    ),
    "Hugging Face hub": ("HF_TOKEN", "HF_TOKEN_PATH"),
}
CREDENTIAL_FILES = {"S3": "~/.aws/credentials", "Hugging Face hub": "~/.cache/huggingface/token"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` says what to do unless all is well."""

    what: str
    state: str
    found: str
    advice: str = ""


def examine(workspace: Path) -> list[Finding]:
    """Look at everything a run needs; takes a few seconds, changes nothing and prints no secret."""
    findings = [check_python(), check_torch()]
    findings += [
        check_distribution(name) for name in ("megatron-core", "transformers", "prefect", "mlflow", "psutil")
    ]
    findings += [check_transformer_engine(), check_disk(workspace), check_ports()]
    findings += [check_credentials(name) for name in CREDENTIALS]
    return [*findings, check_prefect(), check_mlflow()]


def check_python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 13):
        return Finding("Python", OK, found)
    return Finding("Python", MISSING, found, "use Python 3.11 or 3.12")


def check_torch() -> Finding:
    probe = subprocess.run([sys.executable, "-c", TORCH_PROBE], capture_output=True, text=True, timeout=120)
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
        return Finding(
            "torch", MISSING, f"import fails: {last}", "install the environment anew: make clean test"
        )
    version, cuda, devices = probe.stdout.split()
    if int(devices):
        return Finding("torch", OK, f"{version}, CUDA {cuda}, {devices} GPU(s)")
    advice = (
        ""
        if not Path("/dev/nvidia0").exists()
        else "a GPU is there but torch cannot use it: check the driver"
    )
    return Finding(
        "torch", WARNING if advice else OK, f"{version}, no GPU: jobs run on the CPU with gloo", advice
    )


def check_distribution(name: str) -> Finding:
    try:
        return Finding(name, OK, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, MISSING, "not installed", "install the environment anew: make clean test")


def check_transformer_engine() -> Finding:
    try:
        return Finding("transformer-engine", OK, importlib.metadata.version("transformer-engine"))
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "transformer-engine", OK, "not installed; only a GPU needs it", "on a GPU: uv sync --extra gpu"
        )


def check_disk(workspace: Path) -> Finding:
    place = next(path for path in (workspace.absolute(), *workspace.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.0f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("workspace", MISSING, f"{place} cannot be written", "choose another workspace")
    if free < DISK_BYTES:
        return Finding("workspace", WARNING, found, "a release needs about four times its checkpoint's size")
    return Finding("workspace", OK, found)


def check_ports() -> Finding:
    """Open a port on the loopback, as torchrun, gloo and Prefect's own server do."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), SECONDS).close()
    except OSError as error:
        return Finding("local ports", MISSING, str(error), "allow connections to 127.0.0.1")
    return Finding("local ports", OK, "127.0.0.1 can listen and connect")


def check_credentials(name: str) -> Finding:
    """Say where credentials would come from, never what they are."""
    places = [variable for variable in CREDENTIALS[name] if os.environ.get(variable)]
    file = CREDENTIAL_FILES[name]
    places += [file] if Path(file).expanduser().exists() else []
    if places:
        return Finding(f"{name} credentials", OK, f"from {', '.join(places)}")
    advice = f"needed for private places only: set {CREDENTIALS[name][0]}"
    return Finding(f"{name} credentials", OK, "none", advice)


def check_prefect(url: str | None = None) -> Finding:
    """Look for the server at `url`, or at PREFECT_API_URL."""
    url = url or os.environ.get("PREFECT_API_URL")
    if not url:
        return Finding("Prefect", OK, "no PREFECT_API_URL: each run starts a server of its own")
    return _reach("Prefect", url, f"{url.rstrip('/')}/health", "PREFECT_API_URL")


def check_mlflow() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return Finding("MLflow", OK, "no MLFLOW_TRACKING_URI: SQLite in the workspace")
    if not uri.startswith("http"):
        return Finding("MLflow", OK, f"a store of kind {uri.partition(':')[0]}")
    return _reach("MLflow", uri, f"{uri.rstrip('/')}/health", "MLFLOW_TRACKING_URI")


def _reach(what: str, address: str, url: str, variable: str) -> Finding:
    scheme, _, rest = address.partition("://")
    shown = f"{scheme}://{rest.rpartition('@')[2]}"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS):
            return Finding(what, OK, f"answers at {shown}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else type(error).__name__
        advice = f"start it, or unset {variable} to run without"
        return Finding(what, MISSING, f"no answer at {shown}: {reason}", advice)
