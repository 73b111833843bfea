"""One batch through a sharded model, by Megatron's pipeline schedules."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from bridge.distributed import device
from bridge.errors import ConfigError
from training.data import Batch
from training.setup import ForwardStep


def run_batch(
    forward_step: ForwardStep,
    model: list[Any],
    data_iterators: list[Iterator[Batch]],
    *,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    """Run micro-batches forward, and backward unless `forward_only`; every rank of the job takes part.

    Returns the "loss" (a sum over tokens) and "num_tokens" of each, on the last pipeline stage only.
    """
    alone = len(model) == 1
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data_iterators[0] if alone else data_iterators,
        model=model[0] if alone else model,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    check_results(results)
    return results


def check_results(results: list[dict[str, torch.Tensor]]) -> None:
    """Refuse what somebody's own forward step measures, unless the mean loss follows from it."""
    missing = [name for name in ("loss", "num_tokens") if results and name not in results[0]]
    if missing:
        raise ConfigError(
            f"the forward step's loss function measured {', '.join(results[0])}, but not {missing[0]!r}: let"
            ' it return sum, number of tokens and {"loss": sum, "num_tokens": number}, as training.gpt_step'
        )


def sums_of_all_ranks(results: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return the sum of the losses and the number of tokens over all ranks, [2] in fp64 on the device.

    Who reads it waits for the batch.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device())
    for result in results:
        sums += torch.stack([result["loss"].double(), result["num_tokens"].double()])
    # one message to all, which gives every rank the same bits: they decide by this number what to do
    torch.distributed.all_reduce(sums)
    return sums / parallel_state.get_tensor_model_parallel_world_size()


def highest_of_all_ranks(value: float) -> float:
    """Return the highest `value` of any rank, on every rank."""
    highest = torch.tensor(value, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return highest.item()
