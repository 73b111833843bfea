"""The step that proves that the exported checkpoint is the trained one, and better than what it came from."""

from pathlib import Path
from typing import Any

from tasks.artifact import Kind
from tasks.code_version import COMPUTING
from tasks.gates import (
    LEDGER,
    check_config,
    check_coverage,
    check_digests,
    check_logits,
    check_loss,
    conclude,
)
from tasks.spec import ReleaseSpec
from tasks.step import Artifacts, Step, StepContext


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    """Check coverage and digests, then logits of what transformers loads again, then the held-out loss."""
    trained, exported = artifacts["train"].payload, artifacts["export"].payload
    seq_length = artifacts["train"].record["config"]["model"]["seq_length"]
    verdicts = [check_coverage(exported)]
    if verdicts[0]["passed"]:
        verdicts += [
            check_config(trained, exported),
            check_digests(trained, exported, folder / LEDGER),
            *check_logits(trained, exported, spec.check, folder, context),
            check_loss(
                artifacts["import"].payload,
                trained,
                artifacts["build_dataset"].payload,
                seq_length,
                spec.check,
                context,
            ),
        ]
    return conclude(verdicts, folder, context, "verify")


STEP = Step(
    name="verify",
    kind=Kind.GATE_REPORT,
    needs=("import", "build_dataset", "train", "export"),
    config=lambda spec, artifacts: spec.check.model_dump(mode="json"),
    build=build,
    sources=("bridge", "training", "tasks.gates", __name__),
    distributions=(*COMPUTING, "transformers"),
)
