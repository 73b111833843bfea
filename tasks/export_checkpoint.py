"""The step that turns the trained Megatron checkpoint into a Hugging Face one."""

from functools import partial
from pathlib import Path
from typing import Any

from bridge.exporter import export_checkpoint
from tasks.artifact import Kind
from tasks.convert import convert
from tasks.spec import ReleaseSpec
from tasks.step import Artifacts, Step, StepContext


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    """Export the latest checkpoint of the training run."""
    export = partial(
        export_checkpoint,
        artifacts["train"].payload,
        max_shard_size=spec.publish.max_shard_size,
        progress=partial(context.progress, description="bytes exported"),
    )
    return convert(export, folder, context)


STEP = Step(
    name="export",
    kind=Kind.HF_CHECKPOINT,
    needs=("train",),
    config=lambda spec, artifacts: {"max_shard_size": spec.publish.max_shard_size},
    build=build,
    sources=("bridge", "tasks.convert", __name__),
    resumable=True,
)
