"""The record of a checkpoint, `checkpoint.json`: its files with their digests, and the data of its run.

It is written when everything else is, so that a file which is later missing, truncated or changed is named
before anything is loaded. Files of tensors have the CRC-32 of what their writer wrote, which costs next to
nothing; it tells what a disk or a copy spoiled, not what somebody forged.
"""

import itertools
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bridge.byte_copy import BUFFER_SIZE, crc32
from bridge.errors import CheckpointError
from training.slices import file_digest

RECORD = "checkpoint.json"
READERS = 4  # threads of each rank


def write_record(
    folder: Path, iteration: int, data: dict[str, Any], crcs: Mapping[str, int] | None = None
) -> None:
    """Describe the files of a checkpoint that has just been written, those of tensors by their `crcs`."""
    files, crcs = {}, crcs or {}
    for path in sorted(files_of(folder)):
        name = str(path.relative_to(folder))
        digest = {"crc32": f"{crcs[name]:08x}"} if name in crcs else {"sha256": file_digest(str(path))}
        files[name] = {"bytes": path.stat().st_size, **digest}
    record = {"iteration": iteration, "data": data, "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != RECORD]


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
    """Hold all files against the record, those of tensors by size; a CheckpointError names a wrong one."""
    for name, expected in read_record(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint {folder} is damaged: {name} is missing")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {name} has {size} bytes, {expected['bytes']} were"
                " written"
            )
        if "sha256" in expected and file_digest(str(path)) != expected["sha256"]:
            raise CheckpointError(f"the checkpoint {folder} is damaged: {name} is not what was written")


def check_tensors(folder: Path, rank: int, ranks: int) -> None:
    """Read this rank's share of the files of tensors; a CheckpointError names one that has changed."""
    files = read_record(folder)["files"]
    expected = {name: record["crc32"] for name, record in files.items() if "crc32" in record}
    mine = share({name: files[name]["bytes"] for name in expected}, rank, ranks)
    with ThreadPoolExecutor(READERS) as threads:
        found = threads.map(partial(crc_of, folder), mine)
        for name, crc in zip(mine, found, strict=True):
            if crc != expected[name]:
                raise CheckpointError(f"the checkpoint {folder} is damaged: {name} is not what was written")


def share(files: Mapping[str, int], rank: int, ranks: int) -> list[str]:
    """Return a rank's part of files with these sizes: neighbours, as it will load what it once wrote."""
    names = sorted(files, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    total = max(1, sum(files.values()))
    ends = itertools.accumulate(files[name] for name in names)
    return [name for name, end in zip(names, ends, strict=True) if max(0, end - 1) * ranks // total == rank]


def crc_of(folder: Path, name: str) -> str:
    """Return the CRC-32 of a file's bytes as the record has it."""
    crc, buffer = 0, memoryview(bytearray(BUFFER_SIZE))
    try:
        with (folder / name).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                crc = crc32(buffer[:count], crc)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {name} cannot be read: {error}"
        ) from error
    return f"{crc:08x}"
