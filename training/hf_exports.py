"""Hugging Face exports of a run's checkpoints, each made by a process of its own while training goes on."""

import json
import os
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from bridge.job import write_json
from training.checkpoint_folders import (
    REMOVED,
    complete_checkpoints,
    iteration_of,
    latest_complete,
    remove_leftovers,
    remove_old,
)
from training.config import ConfigContainer

GRACE = 10.0  # seconds that a stopped export has to end


@dataclass(frozen=True)
class Export:
    """An export that has ended; `error` says why there is none."""

    iteration: int
    folder: Path
    error: str | None


class HfExports:
    """Exports checkpoints one after the other, on the first rank; what goes wrong does not end training."""

    def __init__(self, config: ConfigContainer) -> None:
        self._settings = config.checkpoint
        self._root = Path(str(config.checkpoint.export_hf))
        self._last = config.train.train_iters
        self._waiting: deque[Path] = deque()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def in_use(self) -> set[Path]:
        """Checkpoints that are still to be read."""
        return set(self._waiting)

    def find_missed(self) -> None:
        """Note the checkpoints whose export an earlier attempt of the run did not come to or not finish."""
        remove_leftovers(self._root, (REMOVED,))
        newest = latest_complete(self._root)
        for folder in complete_checkpoints(Path(str(self._settings.save))):
            if iteration_of(folder) > newest:
                self.add(folder)

    def add(self, checkpoint: Path) -> None:
        """Export a sealed checkpoint if it is due and not there, as soon as those before it are."""
        iteration, interval = iteration_of(checkpoint), self._settings.export_interval
        is_due = iteration == self._last or (interval is not None and iteration % interval == 0)
        if is_due and not self.folder_of(checkpoint).exists():
            self._waiting.append(checkpoint)
            self._start_next()

    def folder_of(self, checkpoint: Path) -> Path:
        return self._root / checkpoint.name

    def poll(self) -> list[Export]:
        """Return the exports that have ended since the last call."""
        if self._process is None or self._process.poll() is None:
            return []
        return [self._end()]

    def finish(self) -> list[Export]:
        """Wait for all exports."""
        ended = []
        while self._process is not None:
            self._process.wait()
            ended.append(self._end())
        return ended

    def stop(self) -> None:
        """Leave what is unfinished to the next attempt, which goes on from the files that are whole."""
        self._waiting.clear()
        if self._process is not None:
            self._process.kill()
            self._process.wait(GRACE)
            self._process = None

    def _start_next(self) -> None:
        if self._process is not None or not self._waiting:
            return
        checkpoint = self._waiting[0]
        job = {
            "megatron": str(checkpoint),
            "hf": str(self.folder_of(checkpoint)),
            "report": str(self._report),
        }
        self._report.unlink(missing_ok=True)
        write_json(self._job, job)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bridge.job", "training.export_job", str(self._job)],
            env={**os.environ, "RANK": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # its report has the error
        )

    @property
    def _job(self) -> Path:
        return self._root / ".export.json"

    @property
    def _report(self) -> Path:
        return self._root / ".export.report.json"

    def _end(self) -> Export:
        checkpoint = self._waiting.popleft()
        assert self._process is not None
        error = None if self._process.returncode == 0 else self._error(self._process.returncode)
        self._process = None
        self._job.unlink(missing_ok=True)
        self._report.unlink(missing_ok=True)
        if error is None:
            remove_old(self._root, self._settings.export_most_recent_k)
        self._start_next()
        return Export(iteration_of(checkpoint), self.folder_of(checkpoint), error)

    def _error(self, returncode: int) -> str:
        try:
            return str(json.loads(self._report.read_text())["error"]["message"])
        except (OSError, ValueError, KeyError):
            return f"its process ended with code {returncode}"
