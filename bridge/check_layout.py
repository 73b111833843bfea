"""How the Megatron end of a check is laid out, in as few ranks as hold the sizes that are asked for."""

import math
from collections.abc import Mapping

from bridge.provider import GPTModelProvider

SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")


def num_ranks(sizes: Mapping[str, int]) -> int:
    """Return the ranks of a job in this layout: experts lie on those that the other layers take already."""
    tensor, pipeline, expert = (sizes[name] for name in SIZES)
    return pipeline * math.lcm(tensor, expert)


def laid_out(provider: GPTModelProvider, sizes: Mapping[str, int]) -> GPTModelProvider:
    """Give a description this layout, and none of what a training run had besides."""
    tensor, _, expert = (sizes[name] for name in SIZES)
    for name in SIZES:
        setattr(provider, name, sizes[name])
    provider.virtual_pipeline_model_parallel_size = None
    provider.context_parallel_size = 1
    # Experts are shared out over the ranks that share the other layers, each expert whole; the dispatcher
    # would send a token as many times as there are ranks that hold it.
    provider.expert_tensor_parallel_size = 1 if expert > 1 else None
    provider.sequence_parallel = tensor > 1 and expert > 1
    return provider
