"""Nemotron: an MLP of squared ReLU without a gate, LayerNorm with weights around zero, half a head turns."""

from bridge.attention_rules import Repeats
from bridge.config_rules import Constant, Field, HeadDim, Requires, Rope
from bridge.decoder import (
    ATTENTION,
    BUFFERS,
    DECODER_CONFIG,
    EMBEDDING,
    MLP_NORM,
    NORM_BIASES,
    OUTPUT,
    UNGATED_MLP,
    with_defaults,
    without,
)
from bridge.family import Family
from bridge.mapping import MegatronMappingRegistry

HEADS, ROPE = HeadDim(), Rope(theta=10000.0, partial=0.5)

FAMILY = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    covers=("Nemotron-3 8B", "Nemotron-4 15B, 340B", "Minitron 4B, 8B"),
    config=(
        *with_defaults(without(DECODER_CONFIG, "rms_norm_eps", "hidden_act"), initializer_range=0.0134),
        Field("norm_eps", "layernorm_epsilon", default=1e-5),
        HEADS,
        ROPE,
        # as the checkpoints had them before transformers had the family
        Repeats("kv_channels", HEADS, "kv_channels"),
        Repeats("rope_percent", ROPE, "rotary_percent"),
        Repeats("rope_percentage", ROPE, "rotary_percent"),
        Constant("normalization", "LayerNorm"),
        Constant("layernorm_zero_centered_gamma", True),
        Constant("activation_func", "squared_relu"),
        Constant("gated_linear_unit", False),
        Requires("hidden_act", ("relu2",)),
        Requires("attention_bias", (False,)),
        Requires("mlp_bias", (False,)),
    ),
    weights=MegatronMappingRegistry(
        EMBEDDING, *ATTENTION, MLP_NORM, *UNGATED_MLP, *NORM_BIASES, *OUTPUT, buffers=BUFFERS
    ),
)
