"""What the steps that convert have in common: each goes on from what a killed run has finished."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.conversion import Conversion
from bridge.job import write_json
from bridge.staging import boot_id
from tasks.step import StepContext

FINISHED = "conversion.json"


def convert(run: Callable[[Path], Conversion], folder: Path, context: StepContext) -> dict[str, Any]:
    """Let `run` write the payload of an artifact, from an earlier run's finished files on; return the output.

    A payload that was finished and not sealed yet is taken as it is.
    """
    payload, note = folder / "checkpoint", folder / FINISHED
    if payload.is_dir() and (found := _finished(note)):
        context.log("the conversion was finished by a run that was stopped before it sealed the result")
        return {**found, "resumed": found["bytes"]}
    shutil.rmtree(payload, ignore_errors=True)
    result = run(payload)
    output = {"tensors": result.tensors, "bytes": result.bytes, "resumed": result.resumed}
    write_json(note, {"boot": boot_id(), "output": output})
    context.log(_told(result))
    return output


def _finished(note: Path) -> dict[str, Any] | None:
    """Return the output of a finished conversion; after another start of the machine files may lack bytes."""
    found = json.loads(note.read_text()) if note.is_file() else {"boot": None}
    return found["output"] if found["boot"] == boot_id() else None


def _told(result: Conversion) -> str:
    resumed = f", {result.resumed:,} of them by a run that was stopped" if result.resumed else ""
    return f"converted {result.tensors} tensors, {result.bytes:,} bytes{resumed}, in {result.seconds:.1f} s"
