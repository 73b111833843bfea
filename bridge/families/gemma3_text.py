"""Gemma 3, text: Gemma 2 with normed queries and keys, five windowed layers to a full one, two ropes."""

from bridge.attention_rules import EmbeddingScale, Former, Nullable, QueryScalar, TwoRopes, WindowedLayers
from bridge.config_rules import Carried, Constant, HeadDim, Requires
from bridge.decoder import DECODER_CONFIG, QK_NORM, sandwich_weights, with_defaults, without
from bridge.family import Family

FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    covers=("Gemma 3 270M, 1B",),
    config=(
        *with_defaults(without(DECODER_CONFIG, "hidden_act"), tie_word_embeddings=True),
        HeadDim(default=256),
        TwoRopes(),
        Constant("activation_func", "gelu_tanh"),
        Constant("layernorm_zero_centered_gamma", True),
        Constant("post_layernorm", True),
        Constant("qk_layernorm", True),
        EmbeddingScale(),
        QueryScalar(),
        WindowedLayers(window=4096, pattern=6),
        Nullable("final_logit_softcapping", "final_logit_softcapping", default=None),
        # transformers reads it and does not use it
        Requires("attn_logit_softcapping", (None,)),
        Requires("hidden_activation", ("gelu_pytorch_tanh",)),
        Former("hidden_act", ("gelu_pytorch_tanh",)),
        Requires("attention_bias", (False,)),
        Requires("use_bidirectional_attention", (False, None)),
        Carried(("cache_implementation",)),
    ),
    weights=sandwich_weights(*QK_NORM),
)
