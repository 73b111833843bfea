"""DeepSeek-V2: latent attention, experts chosen by softmax scores, in V2 from the best groups."""

from bridge.config_rules import Constant, Field, OwnCode, Requires, Rope
from bridge.decoder import BUFFERS, EMBEDDING, OUTPUT, gated_mlp
from bridge.experts import expert_weights, shared_expert_weights
from bridge.family import Family
from bridge.grouped_routing import DenseFirst, GreedyGroupLimit, SharedExperts
from bridge.latent_decoder import LATENT_ATTENTION, LATENT_CONFIG, LATENT_ROPES, OriginalRequires, own_code
from bridge.mapping import MegatronMappingRegistry

FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    covers=("DeepSeek-V2", "DeepSeek-V2.5", "DeepSeek-V2-Lite", "DeepSeek-Coder-V2"),
    config=(
        *LATENT_CONFIG,
        OwnCode(own_code("DeepseekV2")),
        Rope(theta=10000.0, types=LATENT_ROPES),
        Requires("mlp_bias", (False,)),
        DenseFirst(dense=0, experts=64),
        SharedExperts(size=1407, shared=2),
        Field("num_experts_per_tok", "moe_router_topk"),
        GreedyGroupLimit(groups=None, chosen=None, members=1),
        Requires("norm_topk_prob", (False,)),
        Field("routed_scaling_factor", "moe_router_topk_scaling_factor", default=1.0),
        OriginalRequires("scoring_func", ("softmax",)),
        Constant("moe_router_pre_softmax", True),
    ),
    weights=MegatronMappingRegistry(
        EMBEDDING,
        *LATENT_ATTENTION,
        *gated_mlp("dense"),
        *expert_weights(),
        *shared_expert_weights("shared_experts"),
        *OUTPUT,
        buffers=BUFFERS,
    ),
)
