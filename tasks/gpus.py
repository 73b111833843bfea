"""The GPUs that a job started here would get, asked of nvidia-smi: the launcher loads no torch."""

import importlib.metadata
import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import ConfigError
from training.config import ProfilingConfig
from training.precision import MixedPrecisionConfig

QUERY = ("--query-gpu=compute_cap,uuid", "--format=csv,noheader")
SECONDS = 30  # a driver that keeps no state between its users starts for several seconds
# a container may have the driver without its tools
DRIVERS = (Path("/proc/driver/nvidia"), Path("/dev/dxg"))


@dataclass(frozen=True)
class Gpus:
    """How many GPUs a job sees, and the compute capability of the machine's best one; None without any."""

    count: int
    capability: tuple[int, int] | None


NONE = Gpus(0, None)


def gpus_of_jobs() -> Gpus | None:
    """Return what a job of this machine would see; None where only the job itself can tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if computes_elsewhere():
        return None
    if "+cpu" in importlib.metadata.version("torch") or visible in ("", "-1"):
        return NONE
    if not (program := shutil.which("nvidia-smi")):
        return None if any(path.exists() for path in DRIVERS) else NONE
    try:
        asked = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=SECONDS, check=True)
        return read_answer(asked.stdout, visible)
    except (OSError, subprocess.SubprocessError, ValueError):  # an old driver, or one that is out of order
        return None


def computes_elsewhere() -> bool:
    """Say whether Slurm gave us other machines than this one: several, or any while this is a login node."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    return os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1" or "SLURMD_NODENAME" not in os.environ


def read_answer(lines: str, visible: str | None) -> Gpus:
    """Read lines of "9.0, GPU-6f3a..." and leave out what CUDA_VISIBLE_DEVICES hides.

    The capability is the best one's, whichever are visible: CUDA numbers a machine's GPUs by their speed and
    nvidia-smi by their place, and every rank asks its own GPU again.
    """
    gpus = [line.split(", ") for line in lines.splitlines() if line.strip()]
    versions = [tuple(map(int, version.split("."))) for version, _ in gpus]
    count = count_visible([uuid for _, uuid in gpus], visible)
    if not count:
        return NONE
    major, minor = max(versions)
    return Gpus(count, (major, minor))


def count_visible(uuids: list[str], visible: str | None) -> int:
    """Count the GPUs that CUDA_VISIBLE_DEVICES names, up to the first name that is none, as CUDA does."""
    if visible is None:
        return len(uuids)
    names = [name.strip() for name in visible.split(",")]
    if names[0].startswith("MIG-"):
        return 1  # a process sees one part of a divided GPU, however many it is given

    def is_known(name: str) -> bool:
        by_number = name.isdecimal() and int(name) < len(uuids)
        return by_number or (name.startswith("GPU-") and any(uuid.startswith(name) for uuid in uuids))

    return sum(1 for _ in itertools.takewhile(is_known, names))


def needs_gpu(precision: MixedPrecisionConfig | None, profiling: ProfilingConfig | None) -> bool:
    by_precision = precision is not None and (precision.fp16 or precision.fp8 is not None)
    return by_precision or (profiling is not None and bool(profiling.gpu_tools))


def check_gpus(
    num_ranks: int,
    sizes: str,
    precision: MixedPrecisionConfig | None = None,
    profiling: ProfilingConfig | None = None,
) -> None:
    """Refuse a job that this machine's GPUs cannot run, by ConfigError, as far as this process can know.

    Without any GPU a job runs on the CPU, in as many ranks as it likes. `sizes` names the settings that the
    ranks follow from.
    """
    if num_ranks == 1 and not needs_gpu(precision, profiling):
        return  # any machine has that: nvidia-smi may take seconds
    gpus = gpus_of_jobs()
    if gpus is None:
        return
    if precision:
        precision.check_device(gpus.capability)
    if profiling:
        profiling.check_device(gpus.count > 0)
    if 0 < gpus.count < num_ranks:
        raise ConfigError(
            f"{sizes} make {num_ranks} ranks, each with a GPU of its own, and this machine has {gpus.count}:"
            " choose smaller sizes, or CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
