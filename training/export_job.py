"""The job that exports one checkpoint of a run beside it: torch-free, and out of the way of training."""

import os
from pathlib import Path
from typing import Any

from bridge.exporter import export_checkpoint

NICENESS = 10  # training comes first


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Export the checkpoint `megatron` to the folder `hf`; it goes on from an earlier job's files."""
    os.nice(NICENESS)
    result = export_checkpoint(Path(config["megatron"]), Path(config["hf"]))
    return {"tensors": result.tensors, "bytes": result.bytes, "seconds": result.seconds}
