"""Ministral 3, text: Mistral's shape with yarn and queries that grow with the position."""

from bridge.attention_rules import PositionScaledRope
from bridge.config_rules import HeadDim, SlidingWindow
from bridge.decoder import DECODER_CONFIG, decoder_weights, with_defaults
from bridge.family import Family

FAMILY = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    covers=("Ministral 3 3B, 8B, 14B (text)",),
    config=(
        *with_defaults(DECODER_CONFIG, rms_norm_eps=1e-5),
        HeadDim(default=128),
        PositionScaledRope(),
        SlidingWindow(),
    ),
    weights=decoder_weights(),
)
