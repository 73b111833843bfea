"""The modules of the layers: Transformer Engine's on a GPU, else torch's under the same names."""

import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

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
) -> ModuleSpec:
    """Return the modules of one layer, or of a block whose layers differ from one another."""
    engine = uses_transformer_engine(provider)
    if engine:
        spec = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=provider.qk_layernorm, multi_latent_attention=provider.multi_latent_attention
        )
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=provider.qk_layernorm,
            multi_latent_attention=provider.multi_latent_attention,
            normalization=provider.normalization,
        )
    add_features(spec, provider, engine)
    return spec
