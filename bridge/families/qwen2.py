"""Qwen2: Llama's shape with biases on query, key and value; sliding windows are refused."""

from bridge.config_rules import Carried, Constant, EveryLayer, HeadDim, Requires, Rope
from bridge.decoder import DECODER_CONFIG, QKV_BIAS, decoder_weights
from bridge.family import Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    covers=("Qwen2 0.5B to 72B", "Qwen2.5 0.5B to 72B", "DeepSeek-R1-Distill-Qwen"),
    config=(
        *DECODER_CONFIG,
        HeadDim(),
        Rope(theta=10000.0),
        Constant("add_qkv_bias", True),
        Requires("use_sliding_window", (False,)),
        EveryLayer("layer_types", "full_attention"),
        Carried(("sliding_window", "max_window_layers", "use_mrope")),
        # how other programs attend beyond the 256K tokens that Qwen2.5-1M was trained on
        Carried(("dual_chunk_attention_config",)),
    ),
    weights=decoder_weights(QKV_BIAS),
)
