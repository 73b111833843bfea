"""The forward step of a GPT model on one micro-batch, as Megatron's pipeline schedules call it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.utils import get_batch_on_this_cp_rank

from bridge.distributed import device

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, LossFunction]:
    """Run the next micro-batch through `model`; return its output and the function that makes it a loss."""
    batch = get_batch(data_iterator)
    # the model itself needs the mask for the losses of its prediction layers
    output = model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(token_loss, batch["loss_mask"])


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Return this rank's part of the next micro-batch, [micro_batch_size, seq_length] each, on its device."""
    batch = {name: tensor.to(device(), non_blocking=True) for name, tensor in next(data_iterator).items()}
    return get_batch_on_this_cp_rank(batch)


def token_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the losses of the tokens that count; Megatron divides by their number over the whole batch."""
    total = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    # a copy, because the schedules divide the first value in place
    return total, num_tokens, {"loss": total.detach().clone(), "num_tokens": num_tokens}
