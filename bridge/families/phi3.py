"""Phi-3: Llama's shape with query, key and value in one tensor, gate and up in another; longrope."""

from bridge.attention_rules import Former, OriginalLengthRope
from bridge.config_rules import HeadDim, OwnCode, Requires, SlidingWindow
from bridge.decoder import (
    ATTENTION_NORM,
    BUFFERS,
    DECODER_CONFIG,
    EMBEDDING,
    FUSED_GATED_MLP,
    FUSED_QKV,
    MLP_NORM,
    OUTPUT,
    OUTPUT_PROJECTION,
    with_defaults,
)
from bridge.family import Family
from bridge.mapping import MegatronMappingRegistry

FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    covers=("Phi-3 mini, medium", "Phi-3.5 mini", "Phi-4 14B", "Phi-4 mini"),
    config=(
        *with_defaults(DECODER_CONFIG, rms_norm_eps=1e-5),
        HeadDim(),
        OriginalLengthRope(partial=1.0),
        SlidingWindow(),
        Requires("resid_pdrop", (0.0,)),
        Requires("embd_pdrop", (0.0,)),
        *(Former(key, (False,)) for key in ("attention_bias", "mlp_bias", "lm_head_bias")),
        OwnCode(("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM")),
        Former("full_attn_mod", (1,)),
        Former("interpolate_factor", (1,)),
    ),
    weights=MegatronMappingRegistry(
        EMBEDDING,
        ATTENTION_NORM,
        FUSED_QKV,
        OUTPUT_PROJECTION,
        MLP_NORM,
        *FUSED_GATED_MLP,
        *OUTPUT,
        buffers=BUFFERS,
    ),
)
