"""The step that turns the fetched Hugging Face checkpoint into a Megatron one, by copying byte ranges."""

from functools import partial
from pathlib import Path
from typing import Any

from bridge.importer import import_checkpoint
from tasks.artifact import Kind
from tasks.convert import convert
from tasks.spec import ReleaseSpec
from tasks.step import Artifacts, Step, StepContext


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    """Import the source; every tensor and every config key is accounted for, or it is an InputError."""
    progress = partial(context.progress, description="bytes imported")
    source = artifacts["fetch"].payload
    return convert(lambda payload: import_checkpoint(source, payload, progress=progress), folder, context)


STEP = Step(
    name="import",
    kind=Kind.MEGATRON_CHECKPOINT,
    needs=("fetch",),
    config=lambda spec, artifacts: {},
    build=build,
    sources=("bridge", "tasks.convert", __name__),
    resumable=True,
)
