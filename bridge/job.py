"""The entry point of every job process: `-m bridge.job MODULE CONFIG.json` runs `MODULE.main(config)`.

It imports nothing heavy before the job's own module, so that a rank is bound to its launcher's life from the
first milliseconds on.
"""

import ctypes
import importlib
import io
import json
import logging
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from bridge.errors import BridgeworksError, InputError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped and saved, start it again and it goes on

# bound before any fork: a child of a threaded process must not load libraries
_libc = ctypes.CDLL(None)

MARK = "BRIDGEWORKS_JOB"
"""The variable that marks the processes of a job that our launcher started."""


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to end this process when its parent ends; Linux only, elsewhere without effect.

    A parent that has ended before is known by its process id, where the caller can give it.
    """
    if sys.platform != "linux":
        return
    _libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent is not None:
        is_orphan = os.getppid() != parent
    else:  # an agent that our launcher did not start may be process 1
        is_orphan = os.getppid() == 1 and "RANK" in os.environ and MARK in os.environ
    if is_orphan:
        os._exit(1)


def bind_forks() -> None:
    """Let every fork of this process end with it, and so on: they do not inherit what binds this one."""
    forking: list[int] = []

    def note() -> None:
        forking[:] = [os.getpid()]

    os.register_at_fork(before=note, after_in_child=lambda: die_with_parent(*forking))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    beside.replace(path)


def finite(value: Any) -> Any:
    """Return JSON values with null for numbers that are none or infinite, which JSON cannot say."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failure(error: BaseException, exit_code: int) -> dict[str, Any]:
    """Return the report of an error; one of ours is a verdict, which starting again would not change."""
    verdict = isinstance(error, BridgeworksError)
    kind = type(error).__name__
    return {"error": {"type": kind, "message": str(error), "exit_code": exit_code, "verdict": verdict}}


def read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the job file {path}: {error}") from error


def run(module: str, config: dict[str, Any]) -> int:
    """Run one job and return its exit code; its result or its error is written to `config["report"]`."""
    report = Path(config["report"])
    try:
        result = importlib.import_module(module).main(config)
    except BridgeworksError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        write_json(report, failure(error, error.exit_code))
        return error.exit_code
    except Exception as error:
        write_json(report, failure(error, 1))
        raise
    if os.environ.get("RANK", "0") == "0":
        write_json(report, result or {})
    return 0


def write_whole_lines() -> None:
    """Write to the log by the line: the ranks share it, and what one prints in pieces would mix."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def main() -> None:
    die_with_parent()
    write_whole_lines()
    # Megatron's checkpoint writers would wait for a killed rank for ever
    bind_forks()
    # It warns that no CUDA runtime is found wherever CUDA_HOME is set, once for each rank.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bridge.job MODULE CONFIG.json")
    try:
        config = read_config(Path(sys.argv[2]))
    except InputError as error:
        sys.exit(f"error: {error}")
    sys.exit(run(sys.argv[1], config))


if __name__ == "__main__":
    main()
