"""Performs the import or the export step of a release alone, for the tests of steps that are killed.

As a script: `conversion_step.py SPEC.json STEP WHEN` kills itself by SIGKILL, when six tenths are copied
("converting") or when the finished files are digested ("sealing").
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import bridge.chunk_plan
import tasks.artifact
from tasks.artifact import Artifact
from tasks.chain import CHAIN
from tasks.release_run import ReleaseRun
from tasks.spec import ReleaseSpec
from tasks.step import StepContext


class Killed(StepContext):
    """A context that kills the process when more than half of the step is done."""

    def progress(self, done: float, total: float, description: str) -> None:
        if done > 0.6 * total:
            kill()


def kill(*arguments: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process does nothing")


def perform(spec: ReleaseSpec, name: str, context_of: type[StepContext] = StepContext) -> Artifact:
    """Perform one step with the newest artifacts of the steps that it needs."""
    step = next(step for step in CHAIN if step.name == name)
    run = ReleaseRun(spec)
    for needed in step.needs:
        found = run.store.newest(needed, spec.name)
        assert found, needed
        run.artifacts[needed] = found
    decision = run.decide(step)
    assert decision.runs
    try:
        return run.perform(step, decision, context_of(run.record, run.record.folder / name))
    finally:
        run.finish()


if __name__ == "__main__":
    # sizes that only large models reach, made small: several files, one finished after another
    bridge.chunk_plan.SMALL_CHECKPOINT = 0
    if sys.argv[3] == "sealing":
        tasks.artifact.list_files = kill
    made_of = ReleaseSpec.model_validate_json(Path(sys.argv[1]).read_text())
    perform(made_of, sys.argv[2], Killed if sys.argv[3] == "converting" else StepContext)
