"""OLMoE: Llama's attention with a norm over all query and all key heads, experts in every layer."""

from bridge.config_rules import Constant, Field, HeadDim, Requires, Rope
from bridge.decoder import (
    ATTENTION,
    BUFFERS,
    DECODER_CONFIG,
    EMBEDDING,
    OUTPUT,
    QK_NORM_OF_ALL,
    with_defaults,
)
from bridge.experts import NormalizedWeights, expert_weights, routing_config
from bridge.family import Family
from bridge.mapping import MegatronMappingRegistry

FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    covers=("OLMoE 1B-7B",),
    config=(
        *with_defaults(DECODER_CONFIG, rms_norm_eps=1e-5),
        HeadDim(),
        Rope(theta=10000.0),
        Field("num_experts", "num_moe_experts", default=64, aliases=("num_local_experts",)),
        *routing_config(topk=8, aux_loss_coeff=0.01),
        NormalizedWeights(),
        Constant("qk_layernorm", True),
        Constant("qk_layernorm_scope", "layer"),
        Requires("attention_bias", (False,)),
        Requires("clip_qkv", (None,)),
    ),
    weights=MegatronMappingRegistry(
        EMBEDDING, *ATTENTION, *QK_NORM_OF_ALL, *expert_weights(), *OUTPUT, buffers=BUFFERS
    ),
)
