"""A progress artifact in Prefect, kept up to date by a thread: showing work never holds it up."""

import threading
from contextvars import Context
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact

LAST_WORD_SECONDS = 5.0


class ProgressArtifact:
    """Shows the newest of what it is told; what Prefect is too slow for is skipped."""

    def __init__(self, key: str, home: Context) -> None:
        # `home` knows the task run that the artifact belongs to
        self._key, self._home = key, home
        self._newest: tuple[float, str] | None = None
        self._id: UUID | None = None
        self._one_writes = threading.Lock()
        self._thread: threading.Thread | None = None

    def show(self, percent: float, description: str) -> None:
        """Show this soon, unless something newer comes first."""
        with self._one_writes:
            self._newest = (percent, description)
            if self._thread is None:
                self._thread = threading.Thread(target=self._home.copy().run, args=(self._send,), daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Give the last word a few seconds to arrive."""
        if thread := self._thread:
            thread.join(LAST_WORD_SECONDS)

    def _send(self) -> None:
        while newest := self._take():
            percent, description = newest
            try:
                if self._id is None:
                    self._id = create_progress_artifact(percent, self._key, description)
                else:
                    update_progress_artifact(self._id, percent, description)
            except httpx.HTTPError:  # a picture of the work must not end the work; the next one may arrive
                continue

    def _take(self) -> tuple[float, str] | None:
        with self._one_writes:
            newest, self._newest = self._newest, None
            if newest is None:
                self._thread = None
            return newest
