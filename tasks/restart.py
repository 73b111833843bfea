"""Starts a training job again that has lost a process: as a whole, from its last complete checkpoint.

torchrun's own restarts would replace ranks inside a process group and across agents that no longer agree on
who is left (measured on two agents: one recovery in five); a whole new job has nothing to agree on.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bridge.job import write_json
from tasks.errors import JobCrashedError
from training.checkpoint_folders import latest_complete

ATTEMPTS = "attempts.json"
# What ends in one of these twice, at the same place, does so however often it is started.
MISTAKES = (
    "AssertionError",
    "AttributeError",
    "ImportError",
    "IndexError",
    "KeyError",
    "ModuleNotFoundError",
    "NameError",
    "NotImplementedError",
    "TypeError",
    "ValueError",
    "ZeroDivisionError",
)
RUNNING, LOST, DONE, CRASHED, ENDED = "running", "lost", "done", "crashed", "ended"


@dataclass(frozen=True)
class Attempt:
    """One start of a job: from which iteration, up to which complete checkpoint, and how it ended."""

    number: int
    started: float  # seconds since 1970
    from_iteration: int
    # "done", "crashed", "ended" (a verdict, bad input or a stop), "running", or "lost" with its launcher
    outcome: str = RUNNING
    seconds: float | None = None
    to_iteration: int | None = None
    reason: str = ""
    # the guilty rank's stack after a hang, else the last lines of the log
    details: str = ""

    @property
    def job(self) -> str:
        """The name of its job, and of the job's folder."""
        return "job" if self.number == 1 else f"job-{self.number}"

    @property
    def is_fruitless(self) -> bool:
        """Say whether it left no new checkpoint."""
        return self.to_iteration == self.from_iteration

    def repeats(self, before: "Attempt") -> bool:
        """Say whether this attempt and the one before ended without progress by the same mistake."""
        what, _, _ = self.reason.partition(" (log: ")  # that of each attempt has a name of its own
        _, _, error = what.partition(" failed with ")
        return (
            self.is_fruitless
            and before.is_fruitless
            and error.startswith(tuple(f"{name}:" for name in MISTAKES))
            and before.reason.startswith(f"{what} (log: ")
        )


class Attempts:
    """The record of all attempts in a folder's attempts.json, also those of earlier launchers."""

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        self._file, self._checkpoints = folder / ATTEMPTS, checkpoints
        found = json.loads(self._file.read_text()) if self._file.is_file() else []
        attempts = [Attempt(**each) for each in found]
        self.all = [replace(each, outcome=LOST) if each.outcome == RUNNING else each for each in attempts]

    def begin(self) -> Attempt:
        """Note that another attempt begins."""
        self.all.append(Attempt(len(self.all) + 1, time.time(), latest_complete(self._checkpoints)))
        self._write()
        return self.all[-1]

    def end(self, outcome: str, error: BaseException | None = None) -> Attempt:
        """Note how the last attempt ended."""
        reason, _, details = in_words(error).partition("\n") if error else ("", "", "")
        self.all[-1] = replace(
            self.all[-1],
            outcome=outcome,
            seconds=time.time() - self.all[-1].started,
            to_iteration=latest_complete(self._checkpoints),
            reason=reason,
            details=details,
        )
        self._write()
        return self.all[-1]

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(attempt) for attempt in self.all]

    def _write(self) -> None:
        write_json(self._file, self.to_json())


def in_words(error: BaseException) -> str:
    name = type(error).__name__
    # what Python and Prefect raise for a signal says nothing itself
    return f"{name}: {error}" if isinstance(error, Exception) else f"its launcher was told to stop ({name})"


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
    checkpoint and not after two that ended by the same mistake; a verdict of the job, a stop and bad input
    are raised at once. The report gets the list of "attempts", which `folder` holds in attempts.json at any
    time.
    """
    attempts = Attempts(folder, checkpoints)
    fruitless = 0
    attempt: Attempt | None = None
    while True:
        before, attempt = attempt, attempts.begin()
        try:
            report = start(attempt.job)
        except JobCrashedError as error:
            attempt = attempts.end(CRASHED, error)
            fruitless = fruitless + 1 if attempt.is_fruitless else 0
            if fruitless > max_restarts or (before and attempt.repeats(before)):
                raise
            log(f"attempt {attempt.number} crashed: {error}")
            log(f"starting again from iteration {attempt.to_iteration}, attempt {attempt.number + 1}")
        except BaseException as error:
            attempts.end(ENDED, error)
            raise
        else:
            attempts.end(DONE)
            return {**report, "attempts": attempts.to_json()}
