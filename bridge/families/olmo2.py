"""OLMo 2: norms behind attention and MLP instead of in front, queries and keys normed over all heads."""

from bridge.config_rules import Constant, HeadDim, Requires, Rope
from bridge.decoder import DECODER_CONFIG, QK_NORM_OF_ALL, post_norm_weights, with_defaults
from bridge.family import Family

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    covers=("OLMo 2 1B, 7B, 13B, 32B",),
    config=(
        *with_defaults(DECODER_CONFIG, rms_norm_eps=1e-5),
        HeadDim(),
        Rope(theta=10000.0),
        Constant("pre_layernorm", False),
        Constant("post_layernorm", True),
        Constant("qk_layernorm", True),
        Constant("qk_layernorm_scope", "layer"),
        Requires("attention_bias", (False,)),
    ),
    weights=post_norm_weights(*QK_NORM_OF_ALL),
)
