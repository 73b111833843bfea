import os
import signal

import pytest

from training.callbacks import StopOnSignal


@pytest.mark.parametrize("end", ["after_training", "after_failure"])
def test_sigterm_is_whose_it_was_when_the_run_has_ended(end):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        callback = StopOnSignal()
        callback.before_training(None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (callback.received, received) == (True, [])
        getattr(callback, end)(None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_failure_before_the_run_began_leaves_sigterm_alone():
    before = signal.getsignal(signal.SIGTERM)
    StopOnSignal().after_failure(None)
    assert signal.getsignal(signal.SIGTERM) is before
