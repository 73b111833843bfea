"""Gemma 2: Gemma with norms behind attention and MLP, capped logits, a sliding window in every other layer.

Transformer Engine caps no attention logits, so that attention is torch's on a GPU as well.
"""

from bridge.attention_rules import EmbeddingScale, Former, Nullable, QueryScalar, WindowedLayers
from bridge.config_rules import Carried, Constant, HeadDim, Requires, Rope
from bridge.decoder import DECODER_CONFIG, sandwich_weights, with_defaults, without
from bridge.family import Family

FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    covers=("Gemma 2 2B, 9B, 27B",),
    config=(
        *with_defaults(without(DECODER_CONFIG, "hidden_act"), tie_word_embeddings=True),
        HeadDim(default=256),
        Rope(theta=10000.0),
        Constant("activation_func", "gelu_tanh"),
        Constant("layernorm_zero_centered_gamma", True),
        Constant("post_layernorm", True),
        EmbeddingScale(),
        QueryScalar(),
        WindowedLayers(window=4096, pattern=2),
        Nullable("attn_logit_softcapping", "attn_logit_softcapping", default=50.0),
        Nullable("final_logit_softcapping", "final_logit_softcapping", default=30.0),
        Requires("hidden_activation", ("gelu_pytorch_tanh",)),
        Former("hidden_act", ("gelu_pytorch_tanh",)),
        Requires("attention_bias", (False,)),
        Requires("use_bidirectional_attention", (None, False)),
        Carried(("cache_implementation",)),
    ),
    weights=sandwich_weights(),
)
