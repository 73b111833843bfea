"""The record of a checkpoint, `checkpoint.json`: its files with their sizes, and the data it was trained on.

It is written when everything else is, so that a file which is later missing, truncated or exchanged is named
before anything is loaded. Files with tensors are compared by size only: a digest would have all of them read
once more.
"""

import json
from pathlib import Path
from typing import Any

from bridge.errors import CheckpointError
from training.slices import file_digest

RECORD = "checkpoint.json"
DIGESTED = 64 << 20  # bytes; smaller files but those of tensors get a digest, and are read once more
TENSORS = ".distcp"


def write_record(folder: Path, iteration: int, data: dict[str, Any]) -> None:
    """Describe the files of a checkpoint that has just been written."""
    files = {str(path.relative_to(folder)): describe(path) for path in sorted(files_of(folder))}
    record = {"iteration": iteration, "data": data, "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != RECORD]


def describe(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    digest = size < DIGESTED and path.suffix != TENSORS
    return {"bytes": size, **({"sha256": file_digest(str(path))} if digest else {})}


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record; a CheckpointError when it is not there or not whole."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
        return {key: record[key] for key in ("iteration", "data", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {path} cannot be read: {error}"
        ) from error


def check_files(folder: Path) -> None:
    """Hold the files of a checkpoint against its record; a CheckpointError names the first wrong one."""
    for name, expected in read_record(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint {folder} is damaged: {name} is missing")
        found = describe(path)
        if found["bytes"] != expected["bytes"]:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {name} has {found['bytes']} bytes, {expected['bytes']}"
                " were written"
            )
        if found != expected:
            raise CheckpointError(f"the checkpoint {folder} is damaged: {name} is not what was written")
