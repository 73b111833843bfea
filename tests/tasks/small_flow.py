"""A flow of two steps with real job processes, for the tests of how a step runs inside Prefect.

As a script: `small_flow.py WORKSPACE JOB` runs it in a process of its own.
"""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Cancelled

from tasks.artifact import Kind
from tasks.cancel_watch import watch_for_cancellation
from tasks.errors import JobStoppedError
from tasks.launch import job_guard
from tasks.perform_step import perform_step
from tasks.release_run import ReleaseRun
from tasks.spec import ReleaseSpec, parse_spec
from tasks.step import Artifacts, Step, StepContext


def main(config: dict[str, Any]) -> dict[str, Any]:
    """The job: says that it is there, then does what `do` says."""
    Path(config["output"], f"rank{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    if config["do"] == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while config["do"] != "finish":
        time.sleep(0.05)
    print("worked hard")
    return {"loss": 0.5}


def prepare(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    (folder / "checkpoint").touch()
    context.table("files", [{"file": "checkpoint", "bytes": 0}], "What was prepared")
    return {}


def work(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    (folder / "checkpoint").touch()
    with ThreadPoolExecutor(1) as threads:  # as conversions do
        threads.submit(context.progress, 1, 2, "half of it").result()
    job = {"output": str(spec.workspace), "do": spec.source.uri}
    return context.launch("small_flow", job, num_processes=2, grace=1)


def chain(spec: ReleaseSpec) -> tuple[Step, Step]:
    return (
        Step("prepare", Kind.SOURCE, (), lambda spec, artifacts: {}, prepare),
        Step("work", Kind.HF_CHECKPOINT, ("prepare",), lambda spec, _: {"do": spec.source.uri}, work),
    )


def spec_for(workspace: Path, job: str) -> ReleaseSpec:
    nowhere = {"dataset": {"inputs": ["/nowhere"]}, "publish": {"destination": "/nowhere"}}
    return parse_spec({"name": "small", "workspace": workspace, "source": {"uri": job}, **nowhere})


@flow(name="small", persist_result=False)
def small_flow(spec: ReleaseSpec) -> Any:
    run = ReleaseRun(spec, str(flow_run.id))
    (spec.workspace / "flow_run_id").write_text(str(flow_run.id))
    with watch_for_cancellation(flow_run.id) as watch, job_guard():
        try:
            for step in chain(spec):
                perform_step.with_options(name=step.name)(step, run, watch, return_state=True).result()
        except JobStoppedError as error:
            return Cancelled(message=str(error))
        finally:
            run.finish()
    return [record.action for record in run.record.steps]


if __name__ == "__main__":
    small_flow(spec_for(Path(sys.argv[1]), sys.argv[2]))
