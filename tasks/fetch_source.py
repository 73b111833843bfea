"""The step that copies the source checkpoint into the store, pinned and resumable."""

from functools import partial
from pathlib import Path
from typing import Any

from tasks.artifact import Kind
from tasks.fetch import fetch_checkpoint, identify
from tasks.spec import ReleaseSpec
from tasks.step import Artifacts, Step, StepContext


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    """Copy config, tokenizer and weights; a killed attempt is gone on with."""
    progress = partial(context.progress, description="bytes fetched")
    return fetch_checkpoint(spec.source.uri, folder / "checkpoint", on_progress=progress)


STEP = Step(
    name="fetch",
    kind=Kind.SOURCE,
    needs=(),
    config=lambda spec, artifacts: identify(spec.source.uri),
    build=build,
    resumable=True,
)
