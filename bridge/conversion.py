"""What a finished conversion says about itself."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import CheckpointError, ConfigError
from bridge.mapping import WeightPlan


@dataclass(frozen=True)
class Conversion:
    """One import or export: `tensors` counts the model's Hugging Face tensors, `bytes` what was written.

    Each tensor counts once, as in the ledger: not the ones that are tied to it, nor the copies of it that
    prediction layers have and an export writes. `resumed` of the bytes had been written by an earlier,
    interrupted conversion; `started_over` names what was different, if the files that one had finished were
    not used. `quantization` is the method by which the source's weights were quantised, which those written
    are not.
    """

    path: Path
    tensors: int
    bytes: int
    seconds: float
    resumed: int = 0
    quantization: str | None = None
    started_over: tuple[str, ...] = ()


def check_workers(workers: int) -> None:
    """Refuse a number of threads that cannot work."""
    if workers < 1:
        raise ConfigError(f"workers is {workers}: give 1 or more")


def origin_of(plan: WeightPlan, files: Iterable[Path], **settings: Any) -> dict[str, Any]:
    """Say what a conversion's result depends on: its plan, the files that it reads, its settings."""
    digest = hashlib.sha256()
    shapes = plan.hf_shapes, plan.megatron_shapes, plan.tied, sorted(plan.transposed)
    for part in (*plan.blocks, *shapes):  # one by one: the text of them all is long
        digest.update(f"{part}\n".encode())
    return {
        "plan": digest.hexdigest(),
        "files": {name: _version(Path(name)) for name in sorted(str(file.absolute()) for file in files)},
        **settings,
    }


def check_unchanged(origin: dict[str, Any]) -> None:
    """Raise CheckpointError if a file of an `origin_of` is another one now: what was read may be of both.

    A file that became a little shorter is read as zeros up to the end of its last page.
    """
    for name, version in origin["files"].items():
        if not Path(name).exists() or _version(Path(name)) != version:
            raise CheckpointError(f"{name} was changed while it was read: start again when it is complete")


def _version(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]
