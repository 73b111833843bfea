"""A queue of deliveries that happen in the background, so that a slow or dead receiver holds nobody up."""

import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts


def one_line(error: Exception) -> str:
    """Return an error's message on one line, without the passwords of the addresses in it."""
    return re.sub(r"://[^/@\s]+@", "://", " ".join(str(error).split()))[:300]


class Outbox:
    """Delivers in order, each thing again and again until it arrives or is refused for good."""

    def __init__(self, refused_for_good: Callable[[Exception], bool]) -> None:
        self._refused_for_good = refused_for_good
        self._queue: deque[tuple[str, Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._problems: list[str] = []
        self._last_error = "it has not answered yet"
        # a daemon: a receiver that hangs must not keep the process alive
        self._thread = threading.Thread(target=self._deliver_all, name="outbox", daemon=True)
        self._thread.start()

    def put(self, what: str, deliver: Callable[[], Any]) -> "Future[Any]":
        """Queue one delivery; the future gets what `deliver` returns, or the error that refused it.

        After `close` nothing is delivered any more: the future is cancelled.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._deadline is not None:
                future.cancel()
                return future
            self._queue.append((what, deliver, future))
            self._changed.notify_all()
        return future

    def close(self, seconds: float) -> list[str]:
        """Give what is left that much time and return, one line each, what was refused or not delivered."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._changed:
            left = [what for what, _, _ in self._queue]
        return [*self._problems, *([f"not delivered, {self._last_error}: {', '.join(left)}"] if left else [])]

    def _deliver_all(self) -> None:
        pause = FIRST_PAUSE
        while self._wait_for_work():
            what, deliver, future = self._queue[0]
            try:
                future.set_result(deliver())
            except Exception as error:
                self._last_error = one_line(error)
                if not self._refused_for_good(error):
                    self._sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                    continue
                self._problems.append(f"{what} was refused: {self._last_error}")
                future.set_exception(error)
            pause = FIRST_PAUSE
            with self._changed:
                self._queue.popleft()

    def _wait_for_work(self) -> bool:
        """Wait for something to deliver; False when the outbox is closed and empty or out of time."""
        with self._changed:
            while not self._queue and self._deadline is None:
                self._changed.wait()
            return bool(self._queue) and (self._deadline is None or time.monotonic() < self._deadline)

    def _sleep(self, seconds: float) -> None:
        with self._changed:
            if self._deadline is None:
                self._changed.wait_for(lambda: self._deadline is not None, seconds)
            else:
                time.sleep(min(FIRST_PAUSE, max(0.0, self._deadline - time.monotonic())))
