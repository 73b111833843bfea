"""Gemma: Llama's shape with GeGLU, zero-centered norms, a scaled embedding, tied."""

from bridge.attention_rules import EmbeddingScale, Former
from bridge.config_rules import Constant, HeadDim, Requires, Rope
from bridge.decoder import DECODER_CONFIG, decoder_weights, with_defaults, without
from bridge.family import Family

FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    covers=("Gemma 2B, 7B", "Gemma 1.1", "CodeGemma"),
    config=(
        *with_defaults(without(DECODER_CONFIG, "hidden_act"), tie_word_embeddings=True),
        HeadDim(default=256),
        Rope(theta=10000.0),
        Constant("activation_func", "gelu_tanh"),
        Constant("layernorm_zero_centered_gamma", True),
        EmbeddingScale(),
        # transformers takes the former spelling for the tanh approximation as well
        Requires("hidden_act", ("gelu_pytorch_tanh", "gelu")),
        Former("hidden_activation", (None, "gelu_pytorch_tanh")),
        Requires("attention_bias", (False,)),
        Requires("use_bidirectional_attention", (None, False)),
    ),
    weights=decoder_weights(),
)
