"""Changes to Megatron Core's layer specs for what a provider asks for and no spec of Megatron's has."""

from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec

from bridge.core_attention import CoreAttention
from bridge.expert_router import ExpertRouter
from bridge.group_router import GroupRouter, needs_group_router
from bridge.latent_attention import use_latent_attention
from bridge.norms import AllHeadsRMSNorm
from bridge.post_norm import post_norm_linear
from bridge.provider import GPTModelProvider


def add_features(layer: ModuleSpec, provider: GPTModelProvider, transformer_engine: bool) -> None:
    """Change the spec of one layer in place; twice is as once."""
    attention = layer.submodules.self_attention.submodules
    # Transformer Engine's attention caps no logits.
    if not transformer_engine or provider.attn_logit_softcapping:
        softcap = provider.attn_logit_softcapping
        attention.core_attention = ModuleSpec(module=CoreAttention, params={"softcap": softcap})
    if provider.qk_layernorm and provider.qk_layernorm_scope == "layer":
        attention.q_layernorm = norm_of_all("num_attention_heads")
        attention.k_layernorm = norm_of_all("num_query_groups")
    if provider.post_layernorm:
        attention.linear_proj = layer.submodules.mlp.submodules.linear_fc2 = post_norm_linear(
            transformer_engine
        )
    if not provider.pre_layernorm:
        remove_pre_norms(layer, transformer_engine)
    if provider.multi_latent_attention:
        use_latent_attention(layer, provider, transformer_engine)
    if layer.submodules.mlp.module is MoELayer:
        layer.submodules.mlp.submodules.router = router_of(provider)


def router_of(provider: GPTModelProvider) -> Any:
    if needs_group_router(provider):
        return partial(GroupRouter, members=provider.moe_router_group_members)
    return ExpertRouter


def norm_of_all(heads: str) -> ModuleSpec:
    return ModuleSpec(module=AllHeadsRMSNorm, params={"heads": heads})


def remove_pre_norms(layer: ModuleSpec, transformer_engine: bool) -> None:
    """Leave the norms in front of attention and MLP out; Transformer Engine has them in the linear layers."""
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    if transformer_engine:
        layer.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        layer.submodules.mlp.submodules.linear_fc1 = TEColumnParallelLinear
