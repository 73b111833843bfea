"""The step that turns the fetched Hugging Face checkpoint into a Megatron one, by copying byte ranges."""

from functools import partial
from pathlib import Path
from typing import Any

from bridge.importer import import_checkpoint
from tasks.artifact import Kind
from tasks.spec import ReleaseSpec
from tasks.step import Artifacts, Step, StepContext


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    """Import the source; every tensor and every config key is accounted for, or it is an InputError."""
    progress = partial(context.progress, description="bytes imported")
    result = import_checkpoint(artifacts["fetch"].payload, folder / "checkpoint", progress=progress)
    context.log(f"imported {result.tensors} tensors, {result.bytes:,} bytes in {result.seconds:.1f} s")
    return {"tensors": result.tensors, "bytes": result.bytes}


STEP = Step(
    name="import",
    kind=Kind.MEGATRON_CHECKPOINT,
    needs=("fetch",),
    config=lambda spec, artifacts: {},
    build=build,
    sources=("bridge", __name__),
)
