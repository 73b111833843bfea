"""A job of the tests: core attention on two ranks, tensor or context parallel, against the plain formula."""

from typing import Any

import torch
from attention_formula import SHAPES, config, inputs, plain_attention
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.enums import AttnMaskType

from bridge import distributed
from bridge.core_attention import CoreAttention, positions_of_rank
from bridge.distributed import leave_model_parallel
from bridge.provider import GPTModelProvider

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": (5, 0)},
    "capped": {"softcap": 2.0},
    "sinks": {"softmax_type": "learnable"},
    "sinks and window": {"softmax_type": "learnable", "window_size": (5, 0)},
}


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the largest difference of outputs and gradients for each layout and case."""
    return {
        layout: {name: measure(layout, **case) for name, case in CASES.items()}
        for layout in ("tensor_model_parallel_size", "context_parallel_size")
    }


def measure(layout: str, softcap: float | None = None, **values: Any) -> float:
    provider = GPTModelProvider(**SHAPES, **{layout: 2})
    distributed.initialize(provider)
    attention = CoreAttention(
        config(**{layout: 2}, **values), 1, AttnMaskType.causal, "self", softcap=softcap
    )
    query, key, value, sinks, weight = inputs()
    scale = attention.softmax_scale
    rank = torch.distributed.get_rank()

    def part(tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's heads or this rank's positions of [sequence, batch, heads, channels]."""
        if layout == "context_parallel_size":
            return tensor[positions_of_rank(len(tensor) // 2, rank, 2)]
        return tensor.chunk(2, dim=2)[rank]

    leaves = [part(tensor).detach().clone().requires_grad_() for tensor in (query, key, value)]
    if attention.softmax_offset is not None:
        own = sinks.chunk(2)[rank] if layout == "tensor_model_parallel_size" else sinks
        attention.softmax_offset.data.copy_(own)
        check_sharding(attention, layout)
    else:
        sinks = None
    found = attention(*leaves, None).unflatten(-1, (leaves[0].size(2), -1))
    (found * part(weight)).sum().backward()

    whole = [tensor.requires_grad_() for tensor in (query, key, value)]
    expected = plain_attention(*whole, scale, values.get("window_size"), softcap, sinks)
    (expected * weight).sum().backward()
    pairs = [(found, part(expected)), *((a.grad, part(b.grad)) for a, b in zip(leaves, whole, strict=True))]
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    torch.distributed.all_reduce(difference, torch.distributed.ReduceOp.MAX)
    leave_model_parallel()
    return difference.item()


def check_sharding(attention: CoreAttention, layout: str) -> None:
    (sinks,) = attention.sharded_state_dict("self_attention.core_attention.").values()
    assert isinstance(sinks, ShardedTensor)
    assert sinks.key == "self_attention.core_attention.softmax_offset"
    assert sinks.global_shape == (SHAPES["num_attention_heads"],)
    tensor_parallel = layout == "tensor_model_parallel_size"
    rank = torch.distributed.get_rank()
    assert sinks.global_offset == (rank * len(attention.softmax_offset) if tensor_parallel else 0,)
