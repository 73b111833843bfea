"""Llama: grouped-query attention, RMSNorm, SwiGLU, rotary embedding with llama3 scaling, tied or untied."""

from bridge.attention_rules import Former
from bridge.config_rules import Carried, HeadDim, Requires, Rope
from bridge.decoder import DECODER_CONFIG, decoder_weights
from bridge.family import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    covers=("Llama 2", "Llama 3", "Llama 3.1", "Llama 3.2 (text)", "Llama 3.3", "TinyLlama", "SmolLM2"),
    config=(
        *DECODER_CONFIG,
        HeadDim(),
        Rope(theta=10000.0),
        Requires("attention_bias", (False,)),
        Requires("mlp_bias", (False,)),
        # of the program that SmolLM2 was trained with
        Former("rope_interleaved", (False,)),
        Carried(("is_llama_config",)),
    ),
    weights=decoder_weights(),
)
