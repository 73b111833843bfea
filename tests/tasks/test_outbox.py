"""The outbox: order, patience, and saying what was not delivered."""

import threading
import time

import pytest

from tasks import outbox
from tasks.outbox import Outbox


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 0.02)


def refuse_values(error: Exception) -> bool:
    return isinstance(error, ValueError)


def test_delivers_in_order_in_the_background() -> None:
    arrived, box = [], Outbox(refuse_values)
    for number in range(100):
        box.put(str(number), lambda number=number: arrived.append(number))
    assert box.close(60) == []
    assert arrived == list(range(100))


def test_nothing_is_delivered_after_closing() -> None:
    arrived, box = [], Outbox(refuse_values)
    box.close(60)
    assert box.put("late", lambda: arrived.append(1)).cancelled()
    assert arrived == []


def test_tries_again_until_it_arrives() -> None:
    attempts, box = [], Outbox(refuse_values)

    def third_time_lucky() -> str:
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("down")
        return "arrived"

    future = box.put("metrics", third_time_lucky)
    assert future.result(60) == "arrived"
    assert box.close(60) == []


def test_what_is_refused_for_good_is_said_and_the_rest_goes_on() -> None:
    arrived, box = [], Outbox(refuse_values)
    refused = box.put("param x", lambda: int("no number"))
    box.put("metrics", lambda: arrived.append(1))
    problems = box.close(60)
    assert len(problems) == 1
    assert problems[0].startswith("param x was refused: invalid literal")
    assert arrived == [1]
    with pytest.raises(ValueError, match="invalid literal"):
        refused.result(0)


def test_dead_receiver_costs_no_more_than_the_given_time() -> None:
    attempts, tried, box = [], threading.Event(), Outbox(refuse_values)

    def dead() -> None:
        attempts.append(1)
        if len(attempts) == 2:  # what the first one met is on record
            tried.set()
        raise OSError("connection refused")

    box.put("the run", dead)
    box.put("metrics", dead)
    assert tried.wait(60)
    started = time.monotonic()
    assert box.close(0.3) == ["not delivered, connection refused: the run, metrics"]
    assert time.monotonic() - started < 10


def test_hanging_receiver_costs_no_more_than_the_given_time() -> None:
    box, hang = Outbox(refuse_values), threading.Event()
    box.put("the run", lambda: hang.wait(60))
    assert box.close(0.2) == ["not delivered, it has not answered yet: the run"]
    hang.set()
