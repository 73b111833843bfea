"""Mixtral: Mistral's attention, experts in every layer whose chosen weights sum up to 1."""

from bridge.config_rules import Carried, Constant, Field, HeadDim, Rope, SlidingWindow
from bridge.decoder import ATTENTION, BUFFERS, DECODER_CONFIG, EMBEDDING, OUTPUT, with_defaults
from bridge.experts import expert_weights, routing_config
from bridge.family import Family
from bridge.mapping import MegatronMappingRegistry

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    covers=("Mixtral 8x7B", "Mixtral 8x22B"),
    config=(
        *with_defaults(DECODER_CONFIG, rms_norm_eps=1e-5),
        HeadDim(),
        Rope(theta=1000000.0),
        SlidingWindow(),
        Field("num_local_experts", "num_moe_experts", default=8, aliases=("num_experts",)),
        *routing_config(topk=2, aux_loss_coeff=0.001),
        Constant("moe_router_pre_softmax", False),
        # noise on the input of the router in training
        Carried(("router_jitter_noise",)),
    ),
    weights=MegatronMappingRegistry(
        EMBEDDING,
        *ATTENTION,
        *expert_weights("model.layers.*.block_sparse_moe", gate="w1", up="w3", down="w2"),
        *OUTPUT,
        buffers=BUFFERS,
    ),
)
