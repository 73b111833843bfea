"""The folders of a run's checkpoints: their names, which is the latest, and which stay."""

import os
import re
import shutil
import threading
from collections.abc import Collection
from pathlib import Path

from bridge.megatron_checkpoint import LATEST
from bridge.staging import SUFFIX

REMOVED = ".removed"
DAMAGED = ".damaged"


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the iteration folders in order; they get these names only when everything is in them."""
    found = root.iterdir() if root.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"iter_\d{7,}", path.name)), key=iteration_of)


def latest_complete(root: Path) -> int:
    """Return the iteration of the last complete checkpoint; 0 if there is none yet."""
    return max(map(iteration_of, complete_checkpoints(root)), default=0)


def folder_of(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def remove_leftovers(root: Path, suffixes: tuple[str, ...] = (SUFFIX, REMOVED)) -> None:
    """Remove what a killed run was writing or removing."""
    for path in root.glob("iter_*"):
        if path.name.endswith(suffixes):
            shutil.rmtree(path)


def write_latest(root: Path, iteration: int) -> None:
    """Say which checkpoint is the latest, in the file that Megatron-LM's runs have too.

    Its name is then safe from a failure of the machine, so that older ones may go.
    """
    beside = root / f"{LATEST}{SUFFIX}"
    beside.write_text(f"{iteration}\n")
    flush_one(beside)
    beside.replace(root / LATEST)
    flush_one(root)


def flush(folder: Path, but: Collection[str] = ()) -> None:
    """Bring a folder's files and names to the disk; `but` are files of which that is sure already."""
    for path in [*folder.rglob("*"), folder]:
        if str(path.relative_to(folder)) not in but:
            flush_one(path)


def flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old(root: Path, most_recent_k: int | None, in_use: Collection[Path] = ()) -> threading.Thread:
    """Keep the newest checkpoints and those in use; the others lose their names now, and then their files.

    The thread that is returned removes these, which takes a file system as long as much of the writing.
    """
    old = complete_checkpoints(root)[:-most_recent_k] if most_recent_k is not None else []
    unused = [folder for folder in old if folder not in in_use]
    renamed = [folder.rename(folder.with_name(folder.name + REMOVED)) for folder in unused]
    thread = threading.Thread(target=lambda: [*map(shutil.rmtree, renamed)])
    thread.start()
    return thread


def set_aside(folder: Path) -> Path:
    """Take the name of a checkpoint from a damaged one, which stays for a person to look at."""
    aside = folder.with_name(folder.name + DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    return folder.rename(aside)
