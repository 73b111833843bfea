"""As a script: runs the chain up to training for a spec file, without Prefect, for tests that kill it."""

import sys
from pathlib import Path

from tasks.chain import CHAIN
from tasks.release_run import ReleaseRun
from tasks.spec import ReleaseSpec
from tasks.step import StepContext

if __name__ == "__main__":
    run = ReleaseRun(ReleaseSpec.model_validate_json(Path(sys.argv[1]).read_text()))
    for step in CHAIN[: [step.name for step in CHAIN].index("train") + 1]:
        decision = run.decide(step)
        if decision.runs:
            run.perform(step, decision, StepContext(run.record, run.record.folder / step.name))
        else:
            run.reuse(step, decision)
    run.finish()
