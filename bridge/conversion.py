"""What a finished conversion says about itself."""

from dataclasses import dataclass
from pathlib import Path

from bridge.errors import ConfigError


@dataclass(frozen=True)
class Conversion:
    """One import or export: `tensors` counts Hugging Face tensors, `bytes` their bytes, once each."""

    path: Path
    tensors: int
    bytes: int
    seconds: float


def check_workers(workers: int) -> None:
    """Refuse a number of threads that cannot work."""
    if workers < 1:
        raise ConfigError(f"workers is {workers}: give 1 or more")
