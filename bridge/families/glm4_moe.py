"""GLM-4.5: grouped-query attention with a partial rope, DeepSeek-V3's experts and multi-token prediction."""

import dataclasses

from bridge.config_rules import Constant, Field, HeadDim, Rope
from bridge.decoder import (
    ATTENTION,
    BUFFERS,
    DECODER_CONFIG,
    EMBEDDING,
    OUTPUT,
    QK_NORM,
    QKV_BIAS,
    gated_mlp,
    with_defaults,
)
from bridge.experts import expert_weights, routing_config, shared_expert_weights
from bridge.family import Family
from bridge.grouped_routing import EXPERT_BIAS, DenseFirst, GroupLimit, NormalizedSigmoid, SharedExperts
from bridge.mapping import MegatronMappingRegistry
from bridge.mtp import PREDICTION_COPIES, PredictionLayers, prediction_weights

LAYER = (
    *ATTENTION,
    dataclasses.replace(QKV_BIAS, when="add_qkv_bias"),
    *(dataclasses.replace(rule, when="qk_layernorm") for rule in QK_NORM),
    *gated_mlp("dense"),
    *expert_weights(),
    *shared_expert_weights("shared_experts"),
    EXPERT_BIAS,
)

FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    covers=("GLM-4.5 355B-A32B", "GLM-4.5-Air 106B-A12B", "GLM-4.6"),
    config=(
        *with_defaults(DECODER_CONFIG, rms_norm_eps=1e-5),
        HeadDim(),
        Rope(theta=10000.0, partial=0.5),
        Field("attention_bias", "add_qkv_bias", default=False),
        Field("use_qk_norm", "qk_layernorm", default=False),
        DenseFirst(dense=1, experts=128),
        SharedExperts(size=1408, shared=1),
        *routing_config(topk=8),
        GroupLimit(groups=1, chosen=1, members=2),
        NormalizedSigmoid(),
        Field("routed_scaling_factor", "moe_router_topk_scaling_factor", default=1.0),
        Constant("moe_router_score_function", "sigmoid"),
        Constant("moe_router_enable_expert_bias", True),
        PredictionLayers(default=1),
    ),
    weights=MegatronMappingRegistry(
        EMBEDDING,
        *LAYER,
        *prediction_weights(LAYER),
        *OUTPUT,
        buffers=BUFFERS,
        copies=PREDICTION_COPIES,
    ),
)
