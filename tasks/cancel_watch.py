"""Notices that a flow run is being cancelled: without a worker nobody else would act on it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from uuid import UUID

import httpx

from tasks.errors import JobStoppedError
from tasks.launch import halt_jobs

POLL_SECONDS = 3.0


class CancelWatch:
    """Knows whether the flow run was cancelled."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stop the jobs of this process, and whatever asks `check`."""
        self._cancelled.set()
        halt_jobs()

    def check(self) -> None:
        """Raise JobStoppedError if the flow run was cancelled."""
        if self.cancelled:
            raise JobStoppedError("the flow was cancelled")


@contextmanager
def watch_for_cancellation(flow_run_id: UUID) -> Iterator[CancelWatch]:
    """Ask Prefect every few seconds, while the body runs, whether the flow run is to be cancelled."""
    watch, ended = CancelWatch(), threading.Event()
    # in a copy of this context, which says where Prefect's server is
    poll = partial(copy_context().run, _poll, flow_run_id, watch, ended)
    threading.Thread(target=poll, daemon=True).start()
    try:
        yield watch
    finally:
        ended.set()


def _poll(flow_run_id: UUID, watch: CancelWatch, ended: threading.Event) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        while not ended.wait(POLL_SECONDS):
            try:
                state = client.read_flow_run(flow_run_id).state
            except httpx.HTTPError:  # the server is away for a moment; the next look will tell
                continue
            if state and (state.is_cancelling() or state.is_cancelled()):
                watch.cancel()
                return
