"""DeepSeek-V3: latent attention, experts chosen by sigmoid scores in groups, multi-token prediction."""

from bridge.config_rules import Constant, Field, OwnCode, Requires, Rope
from bridge.decoder import BUFFERS, EMBEDDING, OUTPUT, gated_mlp
from bridge.experts import expert_weights, shared_expert_weights
from bridge.family import Family
from bridge.grouped_routing import EXPERT_BIAS, DenseFirst, GroupLimit, NormalizedSigmoid, SharedExperts
from bridge.latent_decoder import LATENT_ATTENTION, LATENT_CONFIG, LATENT_ROPES, OriginalRequires, own_code
from bridge.mapping import MegatronMappingRegistry
from bridge.mtp import PREDICTION_COPIES, PredictionLayers, prediction_weights

LAYER = (
    *LATENT_ATTENTION,
    *gated_mlp("dense"),
    *expert_weights(),
    EXPERT_BIAS,
    *shared_expert_weights("shared_experts"),
)

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    covers=(
        "DeepSeek-V3",
        "DeepSeek-V3-0324",
        "DeepSeek-V3.1",
        "DeepSeek-R1",
        "Moonlight-16B-A3B",
        "Kimi-K2 (as deepseek_v3)",
    ),
    config=(
        *LATENT_CONFIG,
        OwnCode(own_code("DeepseekV3")),
        Rope(theta=10000.0, types=LATENT_ROPES),
        Requires("rope_interleave", (True,)),
        DenseFirst(dense=3, experts=256),
        SharedExperts(size=2048, shared=1),
        Field("num_experts_per_tok", "moe_router_topk", default=8),
        GroupLimit(groups=8, chosen=4, members=2),
        NormalizedSigmoid(),
        Field("routed_scaling_factor", "moe_router_topk_scaling_factor", default=2.5),
        OriginalRequires("scoring_func", ("sigmoid",)),
        OriginalRequires("topk_method", ("noaux_tc",)),
        Constant("moe_router_score_function", "sigmoid"),
        Constant("moe_router_enable_expert_bias", True),
        PredictionLayers(default=1),
    ),
    weights=MegatronMappingRegistry(
        EMBEDDING, *LAYER, *prediction_weights(LAYER), *OUTPUT, buffers=BUFFERS, copies=PREDICTION_COPIES
    ),
)
