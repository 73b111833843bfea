"""A job of the tests: parts of different sizes gathered and scattered between two ranks."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from bridge import distributed
from bridge.provider import GPTModelProvider

SIZES = [3, 1]


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the first rank gets, and the gradients of its part."""
    sizes = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}
    provider = GPTModelProvider(**sizes, vocab_size=8, tensor_model_parallel_size=2)
    distributed.initialize(provider.finalize())
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    part = torch.full((SIZES[rank], 2), float(rank + 1), requires_grad=True)
    gathered = gather_from_sequence_parallel_region(part, group=group, output_split_sizes=SIZES)
    scattered = reduce_scatter_to_sequence_parallel_region(gathered, group, SIZES)
    (scattered * (rank + 1)).sum().backward()
    empty = gather_from_sequence_parallel_region(part[:0], group=group, output_split_sizes=[0, 0])
    assert empty.shape == (0, 2)
    return {"gathered": gathered.tolist(), "scattered": scattered.tolist(), "gradient": part.grad.tolist()}
