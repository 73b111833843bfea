"""Norms that torch and Megatron Core's local layers lack, in torch."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.nn import functional


class ZeroCenteredRMSNorm(torch.nn.Module):
    """RMSNorm that multiplies by one plus its weight, in float32 (Gemma)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, inputs: Tensor) -> Tensor:
        weight = 1.0 + self.weight.float()
        return functional.rms_norm(inputs.float(), weight.shape, weight, self.eps).type_as(inputs)


class ZeroCenteredLayerNorm(torch.nn.Module):
    """LayerNorm that multiplies by one plus its weight, in float32 (Nemotron's LayerNorm1P)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))
        self.bias = torch.nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, inputs: Tensor) -> Tensor:
        weight, bias = 1.0 + self.weight.float(), self.bias.float()
        return functional.layer_norm(inputs.float(), weight.shape, weight, bias, self.eps).type_as(inputs)


NORMS: dict[tuple[str, bool], Any] = {
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("LayerNorm", True): ZeroCenteredLayerNorm,
    ("RMSNorm", True): ZeroCenteredRMSNorm,
}
"""By Megatron's `normalization` and `layernorm_zero_centered_gamma`."""


def build_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """Make the norm that a config names; finalize_model_grads sums its gradients in sequence parallelism."""
    norm = NORMS[config.normalization, config.layernorm_zero_centered_gamma](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm over all heads of a layer at once, for queries or keys (OLMo 2, OLMoE).

    `heads` is the config's field with their number. A rank has its own heads' weights and takes part in the
    sum of squares over all.
    """

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, heads: str) -> None:
        super().__init__()
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.size = getattr(config, heads) * hidden_size
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(self.size // self.tp_group.size()))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Norm [sequence, batch, heads of this rank, channels]."""
        flat = inputs.flatten(-2).float()
        squares = reduce_from_tensor_model_parallel_region(flat.square().sum(-1, keepdim=True), self.tp_group)
        # Every rank's heads depend on the sum, so its gradient is a sum over ranks as well.
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        normed = self.weight.float() * flat * torch.rsqrt(squares / self.size + self.eps)
        return normed.type_as(inputs).view_as(inputs)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Say which heads' weights this rank holds."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
