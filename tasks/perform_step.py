"""The Prefect task that performs one step, and how its log, progress and tables reach Prefect."""

import threading
import time
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from tasks.artifact import Artifact
from tasks.cancel_watch import CancelWatch
from tasks.plan import Decision
from tasks.progress_artifact import ProgressArtifact
from tasks.release_run import ReleaseRun
from tasks.step import Step, StepContext

SECONDS_BETWEEN_UPDATES = 2.0
LOG_LINES, LOG_BYTES = 100, 20_000  # of one record: Prefect keeps each record as a row, and slowly


class Watcher(Protocol):
    """Somebody in this process who wants to see what the flow does, such as the command line."""

    def decided(self, decision: Decision) -> None:
        """A step is about to be performed or reused."""

    def line(self, step: str, text: str) -> None:
        """A step said something."""

    def progressed(self, step: str, done: float, total: float, description: str) -> None:
        """A step is so far."""

    def finished(self, step: str, artifact: Artifact, seconds: float) -> None:
        """A step's artifact is there."""


watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@dataclass
class PrefectContext(StepContext):
    """A step's context inside a Prefect task: batched log records, a progress artifact, table artifacts."""

    name: str = ""
    watch: CancelWatch = field(default_factory=CancelWatch)
    _lines: list[str] = field(default_factory=list)
    _flushed: float = 0.0
    _updated: float = 0.0
    _artifact: ProgressArtifact | None = None
    # conversions report from threads of their own, which know nothing of the task run
    _home: Context = field(default_factory=copy_context)
    _one_reports: threading.Lock = field(default_factory=threading.Lock)

    def log(self, line: str) -> None:
        if found := watcher.get():
            found.line(self.name, line)
        self._lines.append(line)
        self.tick()

    def tick(self) -> None:
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_UPDATES:
            self.flush()

    def finish(self) -> None:
        """Send what has not been sent yet."""
        self.flush()
        if self._artifact:
            self._artifact.finish()

    def flush(self) -> None:
        """Send what was logged since the last time as one record."""
        if self._lines:
            get_run_logger().info(shortened(self._lines))
        self._lines, self._flushed = [], time.monotonic()

    def progress(self, done: float, total: float, description: str) -> None:
        self.watch.check()
        with self._one_reports:
            self._home.run(self._progress, done, total, description)

    def _progress(self, done: float, total: float, description: str) -> None:
        if found := watcher.get():
            found.progressed(self.name, done, total, description)
        if time.monotonic() - self._updated > SECONDS_BETWEEN_UPDATES or done >= total:
            self._updated = time.monotonic()
            self._artifact = self._artifact or ProgressArtifact(self._key(self.name), self._home)
            self._artifact.show(100.0 * done / max(total, 1), description)

    def table(self, name: str, rows: list[dict[str, Any]], description: str) -> None:
        try:
            create_table_artifact(rows, key=self._key(name), description=description)
        except httpx.HTTPError as error:  # the report is in the artifact; this only shows it
            self.log(f"the table {name} could not be shown in Prefect: {error}")

    def _key(self, name: str) -> str:
        return f"{self.record.name}-{name}".replace("_", "-").lower()


def shortened(lines: list[str]) -> str:
    """Join lines into one record of bearable size; the whole log is in the run's folder."""
    shown = lines[-LOG_LINES:]
    text = "\n".join(shown)[-LOG_BYTES:]
    left_out = len(lines) - len(shown)
    return f"... {left_out} more lines in job.log\n{text}" if left_out else text


@task(cache_policy=NO_CACHE, persist_result=False)
def perform_step(step: Step, run: ReleaseRun, watch: CancelWatch) -> "Artifact | State[Artifact]":
    """Reuse a step's artifact or build it; a reused one shows as Cached."""
    watch.check()
    decision = run.decide(step)
    if found := watcher.get():
        found.decided(decision)
    if decision.runs:
        state = build_step(step, decision, run, watch)
    else:
        artifact = run.reuse(step, decision)
        state = Completed(name="Cached", message=decision.reason, data=artifact)
    if found:
        found.finished(step.name, run.artifacts[step.name], run.record.steps[-1].seconds)
    return state


def build_step(step: Step, decision: Decision, run: ReleaseRun, watch: CancelWatch) -> Artifact:
    """Build a step's artifact with a context that belongs to the current task run."""
    get_run_logger().info("%s runs: %s", step.name, decision.reason)
    context = PrefectContext(run.record, run.record.folder / step.name, name=step.name, watch=watch)
    try:
        return run.perform(step, decision, context)
    finally:
        context.finish()
