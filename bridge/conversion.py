"""What a finished conversion says about itself."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import ConfigError
from bridge.mapping import WeightPlan


@dataclass(frozen=True)
class Conversion:
    """One import or export: `tensors` counts the model's Hugging Face tensors, `bytes` what was written.

    Each tensor counts once, as in the ledger: not the ones that are tied to it, nor the copies of it that
    prediction layers have and an export writes. `resumed` of the bytes had been written by an earlier,
    interrupted conversion. `quantization` is the method by which the source's weights were quantised, which
    those written are not.
    """

    path: Path
    tensors: int
    bytes: int
    seconds: float
    resumed: int = 0
    quantization: str | None = None


def check_workers(workers: int) -> None:
    """Refuse a number of threads that cannot work."""
    if workers < 1:
        raise ConfigError(f"workers is {workers}: give 1 or more")


def origin_of(plan: WeightPlan, files: Iterable[Path], **settings: Any) -> dict[str, Any]:
    """Say what a conversion's result depends on: its plan, the files that it reads, its settings."""
    content = (plan.blocks, plan.hf_shapes, plan.megatron_shapes, plan.tied, sorted(plan.transposed))
    stats = {str(file.absolute()): file.stat() for file in files}
    return {
        "plan": hashlib.sha256(repr(content).encode()).hexdigest(),
        "files": {name: [found.st_size, found.st_mtime_ns] for name, found in sorted(stats.items())},
        **settings,
    }
