"""A job of the tests: what two ranks come to know of each other's answers and errors."""

import os
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from bridge.agreement import (
    answer_of_first_rank,
    first_of_all,
    is_first_rank,
    on_every_rank,
    on_first_rank,
    said_by_all,
)
from bridge.distributed import start_process_group
from bridge.errors import BridgeworksError, ConfigError, OtherRankError

HANGS = 120.0  # seconds, after which a rank that waits for ever ends


def main(config: dict[str, Any]) -> dict[str, list[Any]]:
    """Return for each case what it is on either rank."""
    guard = threading.Timer(HANGS, os._exit, (3,))
    guard.daemon = True
    guard.start()
    start_process_group()
    rank = torch.distributed.get_rank()
    done: list[int] = []
    return {
        "ours of one": of_both(lambda: on_every_rank(lambda: refuse() if rank == 1 else None)),
        "ours of both": of_both(lambda: on_every_rank(refuse)),
        "another's of one": of_both(lambda: on_every_rank(lambda: fail() if rank == 1 else None)),
        "no error": of_both(lambda: on_every_rank(lambda: None)),
        "ours of the first": of_both(lambda: on_first_rank(refuse)),
        "another's of the first": of_both(lambda: on_first_rank(fail)),
        "done by the first": of_both(lambda: on_first_rank(lambda: done.append(rank)) or list(done)),
        "answer": of_both(lambda: answer_of_first_rank(lambda: [rank])),
        "answer refused": of_both(lambda: answer_of_first_rank(refuse)),
        "answer failed": said_by_all(failed_answer()),
        "first of all": of_both(lambda: first_of_all([f"of {rank}", None][rank])),
        "only of the second": of_both(lambda: first_of_all([None, f"of {rank}"][rank])),
        "of none": of_both(lambda: first_of_all(None)),
    }


def refuse() -> NoReturn:
    raise ConfigError("is wrong")


def fail() -> NoReturn:
    raise OSError("the disk\nis away")


def of_both(work: Callable[[], Any]) -> list[Any]:
    return said_by_all(answer_or_line(work))


def answer_or_line(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (BridgeworksError, OtherRankError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def failed_answer() -> Any:
    """Return what a rank has of a question at which the first one fails.

    The first one goes on to the next question, which is the one that the other still waits for.
    """
    failed = answer_or_line(lambda: answer_of_first_rank(fail if is_first_rank() else lambda: None))
    if is_first_rank():
        answer_of_first_rank(lambda: "the next answer")
    return failed
