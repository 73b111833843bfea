"""The modules of the layers: Transformer Engine's on a GPU, else torch's under the same names."""

import importlib.util
from collections.abc import Sequence

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from bridge.engine_activation import EngineActivation
from bridge.errors import ConfigError
from bridge.layer_features import add_features
from bridge.provider import GPTModelProvider


def uses_transformer_engine(provider: GPTModelProvider) -> bool:
    """Say which layer spec the model gets; both have the same parameter names in a checkpoint."""
    available = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if provider.transformer_impl == "transformer_engine" and not available:
        raise ConfigError(
            "model.transformer_impl is 'transformer_engine', which needs a GPU and the extra 'gpu':"
            " choose 'auto' or 'local'"
        )
    return available and provider.transformer_impl != "local"


def layer_spec(
    provider: GPTModelProvider, config: TransformerConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the modules of one layer, or of this stage's layers where they differ from one another."""
    engine = uses_transformer_engine(provider)
    if provider.homogeneous_layers:
        return one_layer(provider, config, experts=provider.num_moe_experts is not None)
    layers = {experts: one_layer(provider, config, experts) for experts in (False, True)}
    return TransformerBlockSubmodules(
        layer_specs=[layers[provider.moe_layers[number]] for number in layers_of_stage(config, vp_stage)],
        layer_norm=TENorm if engine else WrappedTorchNorm,
    )


def layers_of_stage(config: TransformerConfig, vp_stage: int | None) -> Sequence[int]:
    """Return the numbers of the decoder layers that this pipeline stage holds, counted from 0."""
    if (layout := config.pipeline_model_parallel_layout) is not None:
        return layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))


def one_layer(provider: GPTModelProvider, config: TransformerConfig, experts: bool) -> ModuleSpec:
    """Return the modules of a layer with or without experts."""
    engine = uses_transformer_engine(provider)
    if experts and provider.add_bias_linear and not engine and torch.cuda.is_available():
        # bridge.cpu_moe mends on the CPU what Megatron's local modules do to gradients of these biases
        raise ConfigError(
            "experts with biases need Transformer Engine on a GPU: install the extra 'gpu' and set"
            " model.transformer_impl to 'auto'"
        )
    options = {
        "num_experts": provider.num_moe_experts if experts else None,
        "qk_layernorm": provider.qk_layernorm,
        "multi_latent_attention": provider.multi_latent_attention,
    }
    if engine:
        spec = get_gpt_layer_with_transformer_engine_spec(moe_grouped_gemm=True, **options)
        if config.use_te_activation_func:
            spec.submodules.mlp.submodules.activation_func = EngineActivation
    else:
        spec = get_gpt_layer_local_spec(normalization=provider.normalization, **options)
        if experts:
            # Transformer Engine has this norm in linear_fc1 of dense layers only.
            spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    add_features(spec, provider, engine)
    return spec
