"""Where the pages of a run are: Prefect's and MLflow's, with or without servers that run already."""

import os
import sys
from pathlib import Path
from typing import Any


def prepare_prefect(workspace: Path) -> None:
    """Set what a flow in this process needs, before Prefect is imported; what the user has set is kept.

    Who has never used Prefect gets its database in the workspace, beside what it is about.
    """
    own = workspace.absolute() / "prefect"
    if not os.environ.get("PREFECT_API_URL") and (own.exists() or not (Path.home() / ".prefect").exists()):
        os.environ.setdefault("PREFECT_HOME", str(own))
    # on a busy machine a first start with its migrations takes longer than Prefect's 20 seconds
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    # the command shows the steps itself; the records still reach the pages
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def page_lines(identifiers: dict[str, Any]) -> list[str]:
    """Return one line each to open the Prefect and the MLflow page of a run."""
    lines = []
    if flow_run_id := identifiers.get("prefect_flow_run_id"):
        lines.append(f"Prefect: {prefect_page(flow_run_id)}")
    if (mlflow := identifiers.get("mlflow")) and mlflow["run_id"]:
        lines.append(f"MLflow:  {mlflow_page(mlflow)}")
    return lines


def prefect_page(flow_run_id: str) -> str:
    """Return the address of a flow run, after the command that starts a server where none runs."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    page = f"/runs/flow-run/{flow_run_id}"
    if settings.api.url:
        return (settings.ui_url or settings.api.url.removesuffix("/api")).rstrip("/") + page
    command = f"PREFECT_HOME={settings.home} {_program('prefect')} server start"
    return f"{command}   # then open http://127.0.0.1:{settings.server.api.port}{page}"


def mlflow_page(mlflow: dict[str, Any]) -> str:
    """Return the same for an MLflow run."""
    page = f"/#/experiments/{mlflow['experiment_id']}/runs/{mlflow['run_id']}"
    uri = mlflow["tracking_uri"]
    if uri.startswith("http"):
        return uri.rstrip("/") + page
    command = f"{_program('mlflow')} server --backend-store-uri {uri} --port 5000"
    return f"{command}   # then open http://127.0.0.1:5000{page}"


def _program(name: str) -> str:
    """Return the program of this environment, which need not be on the PATH."""
    return str(Path(sys.executable).with_name(name))
