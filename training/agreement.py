"""What one rank finds out for all of them; all ranks call these functions together."""

from collections.abc import Callable
from typing import TypeVar

import torch

from bridge.errors import BridgeworksError

Answer = TypeVar("Answer")


def on_first_rank(function: Callable[[], Answer]) -> Answer:
    """Return on every rank what `function` says on the first one, or raise its error there."""
    answer: list[Answer | BridgeworksError | None] = [None]
    if torch.distributed.get_rank() == 0:
        answer = [answer_or_error(function)]
    torch.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], BridgeworksError):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]


def answer_or_error(function: Callable[[], Answer]) -> Answer | BridgeworksError:
    try:
        return function()
    except BridgeworksError as error:
        return error


def first_of_all(mine: Answer | None) -> Answer | None:
    """Return what the first rank says that says anything."""
    everyone: list[Answer | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return next((answer for answer in everyone if answer is not None), None)
