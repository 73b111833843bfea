"""How long the parts of an iteration take, measured without making the host wait for the GPU."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Mark = Any


class Stopwatch:
    """Adds up named spans of an iteration: on a GPU by events between its kernels, else by the clock."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._opened: dict[str, Any] = {}

    def start(self, name: str) -> None:
        """Begin a span; one that has begun already begins anew."""
        self._opened[name] = self._mark()

    def stop(self, name: str) -> None:
        """End a span."""
        self._spans[name].append((self._opened.pop(name), self._mark()))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure what happens within."""
        self.start(name)
        yield
        self.stop(name)

    def host_seconds(self, name: str, seconds: float) -> None:
        """Count seconds that the host alone spent."""
        self._spans[name].append((0.0, seconds))

    def read(self) -> dict[str, float]:
        """Wait for the GPU to end what was measured; return the seconds of each name and begin again."""
        if self._on_gpu:
            torch.cuda.synchronize()
        totals = {name: sum(length(*pair) for pair in pairs) for name, pairs in self._spans.items()}
        self._spans.clear()
        return totals

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def length(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


class TimedData:
    """An iterator that measures how long its user waits for "data"; "forward" begins when they are there."""

    def __init__(self, batches: Iterator[Any], stopwatch: Stopwatch) -> None:
        self._batches, self._stopwatch = batches, stopwatch

    def __iter__(self) -> "TimedData":
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        batch = next(self._batches)
        self._stopwatch.host_seconds("data", time.perf_counter() - started)
        self._stopwatch.start("forward")
        return batch


def timed_forward(forward_step: Callable[..., Any], stopwatch: Stopwatch) -> Callable[..., Any]:
    """Return `forward_step` with its end as the end of "forward", which `TimedData` began."""

    def step(*arguments: Any) -> Any:
        result = forward_step(*arguments)
        stopwatch.stop("forward")
        return result

    return step
