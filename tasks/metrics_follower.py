"""Follows the metrics file of a training job and passes it on: progress to the person, curves to MLflow."""

import time
from pathlib import Path
from typing import Any

from tasks.lineage import Metric
from tasks.step import StepContext
from training.metrics import read_metrics

CURVES = (
    "loss",
    "validation_loss",
    "learning_rate",
    "grad_norm",
    "seconds",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "tflops_per_gpu",
    "peak_share",
    "peak_memory_gib",
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "optimizer_seconds",
    "checkpoint_seconds",
    "checkpoint_written_seconds",
    "load_balancing_loss",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "z_loss",
    "mtp_1_loss",
    "mtp_2_loss",
    "loss_scale",
    "nan",
    "spike",
    "skipped",
)
SECONDS_BETWEEN_READS = 2.0


class MetricsFollower:
    """Reads what a job has appended; delivers each point of a curve once, however often it is asked."""

    def __init__(self, path: Path, train_iters: int, context: StepContext) -> None:
        self._path, self._train_iters, self._context = path, train_iters, context
        self._delivered: set[tuple[str, int]] = set()
        self._size = -1
        self._next = 0.0

    def tick(self) -> None:
        """Look whether there is something new, every few seconds; cheap to call."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS_BETWEEN_READS
        if records := self.deliver():
            loss = next((record["loss"] for record in reversed(records) if "loss" in record), float("nan"))
            description = f"iteration {records[-1]['iteration']} of {self._train_iters}, loss {loss:.4f}"
            self._context.progress(records[-1]["iteration"], self._train_iters, description)

    def deliver(self) -> list[dict[str, Any]]:
        """Pass on every point that has not been passed on; return all records if there is anything new."""
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size in (0, self._size):
            return []
        self._size = size
        records = read_metrics(self._path)
        self._context.run.log_metrics(list(self._new_points(records)))
        return records

    def _new_points(self, records: list[dict[str, Any]]) -> list[Metric]:
        points = []
        for record in records:
            for name in CURVES:
                point = (name, record["iteration"])
                if name in record and point not in self._delivered:
                    self._delivered.add(point)
                    points.append(Metric(name, record[name], record["iteration"], record["time"]))
        return points
