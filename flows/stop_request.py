"""How `bridgeworks train` is stopped: its job hears of the signal, saves, and may be gone on with."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import JobSavedError, JobStoppedError
from training.checkpoint_folders import latest_complete


class StopRequest:
    """Whether a signal has told this process to stop, and how long its job then has.

    The signal only leaves a note, which `check` reads at a safe place: a second one, as `timeout` and some
    schedulers send it, does not cut short the wait for the job. Only a second Ctrl-C does.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.signal: signal.Signals | None = None
        self.passed_on_at = 0.0

    def note(self, number: int, frame: Any) -> None:
        """Be the handler of a signal."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def check(self) -> None:
        """Raise JobStoppedError, which makes the launcher stop the job, once the signal has come."""
        if self.signal is None:
            return
        print(
            f"{self.signal.name}: the job ends its iteration and saves, for which it has {self.grace:g}"
            " seconds (--grace)",
            file=sys.stderr,
            flush=True,
        )
        self.passed_on_at = time.monotonic()
        raise JobStoppedError(f"told to stop by {self.signal.name}")

    def outcome(self, job: Path, checkpoints: Path) -> dict[str, Any]:
        """Return the report of a stopped job that had done everything; else JobSavedError or JobStoppedError.

        `job` is the folder of its log and report.
        """
        told = f"told to stop by {self.signal.name}" if self.signal else "the job was told to stop"
        file = job / "report.json"
        report = json.loads(file.read_text()) if file.is_file() else {}
        if report.get("stopped"):
            raise JobSavedError(
                f"{told}: iteration {report['iteration']} is saved in {checkpoints}; the same command goes on"
                " from there"
            )
        if report and "error" not in report:
            return report
        last = latest_complete(checkpoints)
        again = f"goes on from iteration {last}" if last else "begins anew"
        raise JobStoppedError(
            f"{told}: {self._ending(report)} (log: {job / 'job.log'}); the same command {again}"
        )

    def _ending(self, report: dict[str, Any]) -> str:
        if report:
            return f"the job then failed with {report['error']['type']}: {report['error']['message']}"
        if self.signal and time.monotonic() - self.passed_on_at >= self.grace:
            return f"the job had not saved after {self.grace:g} seconds and was killed, --grace gives it more"
        return "the job ended without saving, as any does before its first iteration"


@contextmanager
def noting_stops(grace: float) -> Iterator[StopRequest]:
    """Let SIGTERM and Ctrl-C leave a note while the body runs, in the main thread."""
    request = StopRequest(grace)
    before = {number: signal.signal(number, request.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
