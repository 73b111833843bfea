"""The flow `release-model`: a Hugging Face checkpoint becomes a trained, verified, published successor."""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, State

from tasks.cancel_watch import CancelWatch, watch_for_cancellation
from tasks.chain import CHAIN
from tasks.errors import JobStoppedError
from tasks.launch import job_guard
from tasks.perform_step import perform_step
from tasks.preflight import check_spec
from tasks.release_run import ReleaseRun
from tasks.spec import ReleaseSpec, absolute


@flow(name="release-model", flow_run_name="{spec.name}", persist_result=False)
def release_model(spec: ReleaseSpec) -> "dict[str, Any] | State":
    """Fetch, import, train, export, verify and publish a model; steps that are done already are reused.

    Returns what became of each step, where the release lies, and what could not be recorded.
    """
    spec = absolute(spec, Path.cwd())
    check_spec(spec)
    run = ReleaseRun(spec, str(flow_run.id))
    with watch_for_cancellation(flow_run.id) as watch, job_guard():
        try:
            perform_steps(run, watch)
        except BaseException as error:
            report_problems(run.finish(error))
            if isinstance(error, JobStoppedError) and watch.cancelled:
                return Cancelled(message=str(error))
            raise
    return summary(run, report_problems(run.finish()))


def perform_steps(run: ReleaseRun, watch: CancelWatch) -> None:
    """Perform the chain, each link a task of its own name."""
    for step in CHAIN:
        perform_step.with_options(name=step.name)(step, run, watch, return_state=True).result()


def report_problems(problems: list[str]) -> list[str]:
    """Say what MLflow did not take."""
    for problem in problems:
        get_run_logger().warning("MLflow: %s", problem)
    return problems


def summary(run: ReleaseRun, problems: list[str]) -> dict[str, Any]:
    """Return what the command line and the API show of a finished run."""
    return {
        "name": run.spec.name,
        "folder": str(run.record.folder),
        "steps": [record.to_dict() for record in run.record.steps],
        "release": run.artifacts["publish"].output,
        "identifiers": run.record.identifiers,
        "problems": problems,
    }
