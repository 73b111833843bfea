"""Qwen2 with experts: Qwen2's attention, a gated shared expert; sliding windows are refused."""

import dataclasses

from bridge.config_rules import Carried, Constant, EveryLayer, Field, HeadDim, Requires, Rope
from bridge.decoder import ATTENTION, BUFFERS, DECODER_CONFIG, EMBEDDING, OUTPUT, QKV_BIAS, gated_mlp
from bridge.experts import (
    SHARED_EXPERT_GATE,
    NormalizedWeights,
    SparseLayers,
    expert_weights,
    routing_config,
    shared_expert_weights,
)
from bridge.family import Family
from bridge.mapping import MegatronMappingRegistry

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    covers=("Qwen1.5-MoE A2.7B", "Qwen2 57B-A14B"),
    config=(
        *DECODER_CONFIG,
        HeadDim(),
        Rope(theta=10000.0),
        Field("num_experts", "num_moe_experts", default=60),
        Field("moe_intermediate_size", "moe_ffn_hidden_size", default=1408),
        Field("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", default=5632),
        *routing_config(topk=4, aux_loss_coeff=0.001),
        NormalizedWeights(),
        SparseLayers(),
        Field("qkv_bias", "add_qkv_bias", default=True),
        Constant("moe_shared_expert_gate", True),
        Requires("use_sliding_window", (False,)),
        EveryLayer("layer_types", "full_attention"),
        Carried(("sliding_window", "max_window_layers")),
    ),
    weights=MegatronMappingRegistry(
        EMBEDDING,
        *ATTENTION,
        dataclasses.replace(QKV_BIAS, when="add_qkv_bias"),
        *gated_mlp("dense"),
        *expert_weights(),
        *shared_expert_weights("shared_expert"),
        SHARED_EXPERT_GATE,
        *OUTPUT,
        buffers=BUFFERS,
    ),
)
