"""Qwen3: Llama's shape with RMSNorm on every query and key head; sliding windows are refused."""

from bridge.config_rules import Carried, Constant, EveryLayer, HeadDim, Requires, Rope
from bridge.decoder import DECODER_CONFIG, QK_NORM, decoder_weights
from bridge.family import Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    covers=("Qwen3 0.6B to 32B",),
    config=(
        *DECODER_CONFIG,
        HeadDim(default=128),
        Rope(theta=10000.0),
        Constant("qk_layernorm", True),
        Requires("attention_bias", (False,)),
        Requires("use_sliding_window", (False,)),
        EveryLayer("layer_types", "full_attention"),
        Carried(("sliding_window", "max_window_layers")),
    ),
    weights=decoder_weights(*QK_NORM),
)
