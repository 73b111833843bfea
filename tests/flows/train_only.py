"""As a script: runs the chain up to training for a spec file, without Prefect, for tests that kill it.

`train_only.py SPEC.json [FOLDER]`: the writers of the checkpoint FOLDER stop in the middle of it.
"""

import sys
from pathlib import Path
from typing import Any

from tasks.chain import CHAIN
from tasks.release_run import ReleaseRun
from tasks.spec import ReleaseSpec
from tasks.step import StepContext


class Held(StepContext):
    """A context whose training waits while it writes a checkpoint."""

    def launch(self, module: str, config: dict[str, Any], **options: Any) -> dict[str, Any]:
        if module == "training.pretrain":
            module, config = "training_jobs.held", {**config, "hold": sys.argv[2], "wait_at": None}
        return super().launch(module, config, **options)


if __name__ == "__main__":
    context = Held if len(sys.argv) > 2 else StepContext
    run = ReleaseRun(ReleaseSpec.model_validate_json(Path(sys.argv[1]).read_text()))
    for step in CHAIN[: [step.name for step in CHAIN].index("train") + 1]:
        decision = run.decide(step)
        if decision.runs:
            run.perform(step, decision, context(run.record, run.record.folder / step.name))
        else:
            run.reuse(step, decision)
    run.finish()
