"""What one rank finds out, or fails at, becomes known on all; all ranks call these functions together."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bridge.errors import BridgeworksError, OtherRankError

Answer = TypeVar("Answer")


def is_first_rank() -> bool:
    return torch.distributed.get_rank() == 0


def on_every_rank(work: Callable[[], Any]) -> None:
    """Do this rank's work; where it is an error on one rank, raise it on all, or the others would wait.

    An error that is none of ours keeps its type on its own rank and is an OtherRankError on the others.
    """
    own: Exception | None = None
    try:
        work()
    except Exception as error:
        own = error
    told = own if own is None or isinstance(own, BridgeworksError) else OtherRankError(line_of(own))
    failures = said_by_all(told)
    if own is not None and own is not told:
        raise own
    for rank, found in enumerate(failures):
        if found is not None:
            raise type(found)(f"rank {rank}: {found}" if len(failures) > 1 else str(found)) from own


def on_first_rank(work: Callable[[], Any]) -> None:
    """Do what the first rank does for all while they wait; an error is raised as `on_every_rank` does."""
    on_every_rank(work if is_first_rank() else lambda: None)


def answer_of_first_rank(question: Callable[[], Answer]) -> Answer:
    """Return on every rank what `question` says on the first one; a BridgeworksError there is raised on all.

    It is not said to be the first rank's: what that one looks at is the same for all. Any other error is the
    first rank's alone, and ends the job while the others wait.
    """
    told: list[Answer | BridgeworksError | None] = [None]
    if is_first_rank():
        told = [answer_or_error(question)]
    torch.distributed.broadcast_object_list(told, src=0)
    if isinstance(told[0], BridgeworksError):
        raise told[0]
    return told[0]  # type: ignore[return-value]


def answer_or_error(question: Callable[[], Answer]) -> Answer | BridgeworksError:
    try:
        return question()
    except BridgeworksError as error:
        return error


def first_of_all(mine: Answer | None) -> Answer | None:
    """Return what the first rank says that says anything."""
    return next((answer for answer in said_by_all(mine) if answer is not None), None)


def said_by_all(mine: Answer) -> list[Answer]:
    """Return what every rank says, in the order of ranks."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def line_of(error: Exception) -> str:
    """Return an error's class and message as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
