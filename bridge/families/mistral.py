"""Mistral: Llama's shape with an optional sliding window over all layers."""

from bridge.config_rules import HeadDim, Rope, SlidingWindow
from bridge.decoder import DECODER_CONFIG, decoder_weights
from bridge.family import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    covers=("Mistral 7B v0.1, v0.2, v0.3", "Mistral NeMo 12B", "Mistral Small 24B (text)"),
    config=(*DECODER_CONFIG, HeadDim(), Rope(theta=10000.0), SlidingWindow(default=4096)),
    weights=decoder_weights(),
)
