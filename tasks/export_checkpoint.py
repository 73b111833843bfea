"""The step that turns the trained Megatron checkpoint into a Hugging Face one."""

from functools import partial
from pathlib import Path
from typing import Any

from bridge.exporter import export_checkpoint
from tasks.artifact import Kind
from tasks.spec import ReleaseSpec
from tasks.step import Artifacts, Step, StepContext


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    """Export the latest checkpoint of the training run."""
    result = export_checkpoint(
        artifacts["train"].payload,
        folder / "checkpoint",
        max_shard_size=spec.publish.max_shard_size,
        progress=partial(context.progress, description="bytes exported"),
    )
    context.log(f"exported {result.tensors} tensors, {result.bytes:,} bytes in {result.seconds:.1f} s")
    return {"tensors": result.tensors, "bytes": result.bytes}


STEP = Step(
    name="export",
    kind=Kind.HF_CHECKPOINT,
    needs=("train",),
    config=lambda spec, artifacts: {"max_shard_size": spec.publish.max_shard_size},
    build=build,
    sources=("bridge", __name__),
)
