"""Projections with a norm on their output, where a layer norms what it adds to the residual."""

from functools import cache
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm, TERowParallelLinear
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm


class PostNorm(torch.nn.Module):
    """In front of a row-parallel linear layer in a class's bases: norms its summed output.

    The norm is called `post_layernorm`, as in Megatron Bridge's checkpoints.
    """

    norm: type

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_layernorm = self.norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        output, bias = super().forward(inputs)
        assert bias is None, "a bias would have to be added before the norm"
        return self.post_layernorm(output), None


class PostNormRowParallelLinear(PostNorm, RowParallelLinear):
    norm = WrappedTorchNorm


@cache
def post_norm_linear(transformer_engine: bool) -> type:
    """Return the row-parallel linear layer with a norm on its output for one of the two layer specs."""
    if not transformer_engine:
        return PostNormRowParallelLinear
    # Without Transformer Engine its classes are mocks, of which none can be derived.
    return type("PostNormTERowParallelLinear", (PostNorm, TERowParallelLinear), {"norm": TENorm})
