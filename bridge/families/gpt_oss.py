"""gpt-oss: attention sinks, a sliding window in every other layer, experts with biases and a clamped gate."""

from bridge.attention_rules import WindowedLayers
from bridge.config_rules import Carried, Constant, Dtype, Field, HeadDim, Requires
from bridge.decoder import ATTENTION, BUFFERS, DECODER_CONFIG, EMBEDDING, OUTPUT, QKV_BIAS, with_defaults
from bridge.experts import routing_config
from bridge.family import Family
from bridge.fused_experts import ATTENTION_OUTPUT_BIAS, SINKS, YarnByDefault, fused_expert_weights
from bridge.mapping import MegatronMappingRegistry

FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    covers=("gpt-oss 20B and 120B",),
    config=(
        *with_defaults(DECODER_CONFIG, rms_norm_eps=1e-5),
        Dtype(default="bfloat16"),
        HeadDim(default=64),
        YarnByDefault(theta=150000.0),
        WindowedLayers(window=128, pattern=2),
        Field("num_local_experts", "num_moe_experts", default=128, aliases=("num_experts",)),
        *routing_config(topk=4, aux_loss_coeff=0.001, topk_aliases=("experts_per_token",)),
        Field("swiglu_limit", "activation_func_clamp_value", default=7.0),
        Requires("swiglu_alpha", (1.702,)),  # Megatron's quick_gelu has the number in the code
        Requires("attention_bias", (True,)),
        Constant("activation_func", "quick_gelu"),
        Constant("glu_linear_offset", 1.0),
        Constant("softmax_type", "learnable"),
        Constant("add_bias_linear", True),
        Constant("moe_router_pre_softmax", False),
        Carried(("initial_context_length",)),
    ),
    weights=MegatronMappingRegistry(
        EMBEDDING,
        *ATTENTION,
        QKV_BIAS,
        ATTENTION_OUTPUT_BIAS,
        SINKS,
        *fused_expert_weights(),
        *OUTPUT,
        buffers=BUFFERS,
    ),
)
