"""The step that proves that the imported checkpoint is the fetched one: digests and logits."""

from pathlib import Path
from typing import Any

from tasks.artifact import Kind
from tasks.code_version import COMPUTING
from tasks.gates import LEDGER, check_config, check_digests, check_logits, conclude
from tasks.spec import CheckSpec, ReleaseSpec
from tasks.step import Artifacts, Step, StepContext


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    """Compare both ends bit for bit, then Megatron's logits with those of transformers."""
    source, imported = artifacts["fetch"].payload, artifacts["import"].payload
    verdicts = [
        check_config(source, imported),
        check_digests(source, imported, folder / LEDGER),
        *check_logits(source, imported, spec.check, folder, context),
    ]
    return conclude(verdicts, folder, context, "check_import")


def logits_config(check: CheckSpec) -> dict[str, Any]:
    """Return the settings that decide about a comparison of logits."""
    return check.model_dump(mode="json", exclude={"loss_batches", "max_loss_increase"})


STEP = Step(
    name="check_import",
    kind=Kind.GATE_REPORT,
    needs=("fetch", "import"),
    config=lambda spec, artifacts: logits_config(spec.check),
    build=build,
    sources=("bridge", "tasks.gates", __name__),
    distributions=(*COMPUTING, "transformers"),
)
