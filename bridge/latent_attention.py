"""Multi-head latent attention (DeepSeek-V2) with the parameter names and gradients of every layer spec.

The interleaved pairs of channels that DeepSeek rotates are what Megatron Core takes in this attention
(models/common/embeddings/rope_utils.py, `multi_latent_attention`): weights need no permutation.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    get_cuda_rng_tracker,
)
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer import MLATransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional

from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider

YARN_KEYS = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""Keys of YaRN's rope_parameters and the fields of MLATransformerConfig that mean the same."""


def rope_settings(provider: GPTModelProvider) -> dict[str, Any]:
    """Return the fields of MLATransformerConfig that rope_parameters stand for.

    Every rope type but YaRN is "rope" here and gets its frequencies by `set_frequencies`.
    """
    parameters = provider.rope_parameters
    if parameters["rope_type"] != "yarn":
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    if left_over := sorted(set(parameters) - set(YARN_KEYS) - {"rope_type", "rope_theta"}):
        raise ConfigError(
            f"model.rope_parameters has {left_over[0]!r}, which Megatron's latent attention cannot scale by:"
            f" allowed are {', '.join(YARN_KEYS)}"
        )
    # transformers scales by `factor` alone unless both are given (modeling_rope_utils.py).
    scales = [bool(parameters.get(key)) for key in ("mscale", "mscale_all_dim")]
    if scales[0] != scales[1]:
        raise ConfigError(
            "model.rope_parameters has only one of mscale and mscale_all_dim: give both or neither"
        )
    if not scales[0]:
        parameters = {**parameters, "mscale": 1.0, "mscale_all_dim": 0.0}
    named = {field: parameters[key] for key, field in YARN_KEYS.items() if key in parameters}
    return {"rope_type": "yarn", **named}


def set_frequencies(model: torch.nn.Module, frequencies: Tensor) -> None:
    """Give the attention of every layer these angles per position; YaRN computes its own."""
    for module in model.modules():
        if type(module) is RotaryEmbedding:
            module.inv_freq = frequencies


class NormedColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and a column-parallel projection under the names that Transformer Engine's fused module has."""

    def __init__(
        self, input_size: int, output_size: int, *, config: MLATransformerConfig, **options: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        assert config.normalization == "RMSNorm", config.normalization
        self.eps = config.layernorm_epsilon
        device = torch.cuda.current_device()
        weight = torch.ones(input_size, dtype=config.params_dtype, device=device)
        self.layer_norm_weight = torch.nn.Parameter(weight)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        normed = functional.rms_norm(input_, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **options)


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention, exact in tensor parallelism; `latent_epsilon` is of the latents' norms."""

    def __init__(
        self, config: MLATransformerConfig, *args: Any, latent_epsilon: float, **options: Any
    ) -> None:
        super().__init__(config, *args, **options)
        self.linear_kv_up_proj.eps = latent_epsilon
        if config.q_lora_rank is not None:
            self.linear_q_up_proj.eps = latent_epsilon
        if config.perform_initialization:
            for module in self.modules():
                if isinstance(module, Linear):
                    initialize_alike(module, config)
        if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
            self.linear_kv_down_proj.register_forward_hook(self._sum_positional_gradient)

    def _sum_positional_gradient(self, module: Any, inputs: Any, outputs: tuple[Tensor, Any]) -> Any:
        """Each rank's heads see the one rotated key, so its gradient is a sum over ranks.

        Megatron sums it only where sequence parallelism gathers the key
        (transformer/multi_latent_attention.py, get_query_key_value_tensors).
        """
        output, bias = outputs
        latent, position = output.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat([latent, SumOfGradients.apply(position, self.tp_group)], dim=-1), bias


class SumOfGradients(torch.autograd.Function):
    """The identity, whose gradient is summed over a process group.

    Megatron's copy_to_tensor_model_parallel_region drops the sum of a gradient that is not contiguous
    (tensor_parallel/mappings.py, _reduce).
    """

    @staticmethod
    def forward(context: Any, inputs: Tensor, group: Any) -> Tensor:
        context.group = group
        return inputs.view_as(inputs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=context.group)
        return gradient, None


def initialize_alike(projection: torch.nn.Module, config: MLATransformerConfig) -> None:
    """Draw the weights of a projection that all tensor-parallel ranks hold whole, the same on each."""
    with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
        config.init_method(projection.weight)


def use_latent_attention(layer: ModuleSpec, provider: GPTModelProvider, transformer_engine: bool) -> None:
    """Change the spec of one layer with latent attention in place; twice is as once."""
    attention = layer.submodules.self_attention
    attention.module = LatentAttention
    attention.params = {**attention.params, "latent_epsilon": provider.latent_layernorm_epsilon}
    if transformer_engine:
        return
    if layer.submodules.mlp.module is MLP:
        layer.submodules.sharded_state_dict_keys_map = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    modules = attention.submodules
    # Every rank holds these whole, as in Transformer Engine's spec; Megatron's local spec cuts them.
    modules.linear_q_down_proj = modules.linear_kv_down_proj = Linear
    modules.linear_q_up_proj = modules.linear_kv_up_proj = NormedColumnParallelLinear
    modules.q_layernorm = modules.kv_layernorm = IdentityOp
