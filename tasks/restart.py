"""Starts a training job again that has lost a process: as a whole, from its last complete checkpoint.

torchrun's own restarts would replace ranks inside a process group and across agents that no longer agree on
who is left (measured on two agents: one recovery in five); a whole new job has nothing to agree on.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridge.job import write_json
from bridge.megatron_checkpoint import LATEST
from tasks.errors import JobCrashedError

ATTEMPTS = "attempts.json"


@dataclass(frozen=True)
class Attempt:
    """One start of a job: from which iteration, up to which complete checkpoint, and how it ended."""

    number: int
    started: float  # seconds since 1970
    seconds: float
    from_iteration: int
    to_iteration: int
    outcome: str
    reason: str


def run_with_restarts(
    start: Callable[[str], dict[str, Any]],
    *,
    checkpoints: Path,
    folder: Path,
    max_restarts: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Call `start` with the name of each attempt's job until one ends well; return its report.

    Only a crash is answered by another attempt, at most `max_restarts` of them in a row that bring no new
    checkpoint; a verdict of the job, a stop and bad input are raised at once. The report gets the list of
    "attempts", which `folder` holds in attempts.json at any time.
    """
    attempts: list[Attempt] = []
    fruitless = 0
    for number in itertools.count(1):
        name = "job" if number == 1 else f"job-{number}"
        before, started = latest_iteration(checkpoints), time.time()
        outcome, reason = "done", ""
        try:
            report = start(name)
        except BaseException as error:
            outcome = "crashed" if isinstance(error, JobCrashedError) else "ended"
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            fruitless = fruitless + 1 if latest_iteration(checkpoints) == before else 0
            if outcome == "ended" or fruitless > max_restarts:
                raise
            log(f"attempt {number} crashed: {error}")
        finally:
            after = latest_iteration(checkpoints)
            attempts.append(Attempt(number, started, time.time() - started, before, after, outcome, reason))
            write_json(folder / ATTEMPTS, [asdict(attempt) for attempt in attempts])
        if outcome == "done":
            return {**report, "attempts": [asdict(attempt) for attempt in attempts]}
        log(f"starting again from iteration {after}, attempt {number + 1}")
    raise AssertionError("count() does not end")


def latest_iteration(checkpoints: Path) -> int:
    """Return the iteration of a run's last complete checkpoint; 0 if it has none yet."""
    file = checkpoints / LATEST
    return int(file.read_text()) if file.is_file() else 0
