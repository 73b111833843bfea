"""A forward step whose losses or gradients go wrong on one rank, in chosen micro-batches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from training import gpt_step

LOSS, GRADIENT, SPIKE = "loss", "gradient", "spike"


def spoil(kind: str, losses: torch.Tensor) -> torch.Tensor:
    if kind == LOSS:
        return losses * float("nan")
    if kind == SPIKE:
        return losses * 50
    # the square root of nothing: right in value, with an infinite slope
    return losses + (losses - losses.detach()).sqrt()


def spoiled_step(kind: str, microbatches: Iterable[int], rank: int) -> Callable[..., Any]:
    """Return the forward step that spoils the loss of these calls on `rank`, counted from 0."""
    calls, chosen = [0], set(microbatches)

    def step(data_iterator: Any, model: torch.nn.Module) -> Any:
        output, loss_function = gpt_step.forward_step(data_iterator, model)
        number = calls[0]
        calls[0] += 1
        if number not in chosen or torch.distributed.get_rank() != rank:
            return output, loss_function
        return output, lambda losses: loss_function(spoil(kind, losses))

    return step
