"""Qwen3 with experts: Qwen3's attention, experts in all or some layers; sliding windows are refused."""

from bridge.attention_rules import Former
from bridge.config_rules import Carried, Constant, Field, HeadDim, Requires, Rope
from bridge.decoder import ATTENTION, BUFFERS, DECODER_CONFIG, EMBEDDING, OUTPUT, QK_NORM, gated_mlp
from bridge.experts import NormalizedWeights, SparseLayers, expert_weights, routing_config
from bridge.family import Family
from bridge.mapping import MegatronMappingRegistry

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    covers=("Qwen3 30B-A3B and 235B-A22B", "Qwen3-Coder 30B-A3B and 480B-A35B"),
    config=(
        *DECODER_CONFIG,
        HeadDim(),
        Rope(theta=10000.0),
        Field("num_local_experts", "num_moe_experts", default=128, aliases=("num_experts",)),
        Field("moe_intermediate_size", "moe_ffn_hidden_size", default=768),
        *routing_config(topk=8, aux_loss_coeff=0.001),
        NormalizedWeights(),
        SparseLayers(),
        Constant("qk_layernorm", True),
        Requires("attention_bias", (False,)),
        Requires("use_sliding_window", (False,)),
        Carried(("sliding_window", "max_window_layers")),
        # what Qwen3-Coder says beside, which transformers does not read
        Former("qkv_bias", (False,)),
        Former("use_qk_norm", (True,)),
        Former("shared_expert_intermediate_size", (0,)),
    ),
    weights=MegatronMappingRegistry(
        EMBEDDING, *ATTENTION, *QK_NORM, *gated_mlp("dense"), *expert_weights(), *OUTPUT, buffers=BUFFERS
    ),
)
