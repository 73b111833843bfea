"""Rules that families with a mixture of experts share."""

from dataclasses import dataclass
from typing import Any

from bridge.config_rules import REQUIRED, Carried, Config, ConfigRule, Field, value_of
from bridge.errors import UnsupportedModelError
from bridge.mapping import DirectMapping, GatedMLPMapping, Mapping
from bridge.provider import GPTModelProvider
from bridge.value_types import Count, by_name

HF_MLP, MEGATRON_MLP = "model.layers.*.mlp", "decoder.layers.*.mlp"


@dataclass(frozen=True)
class NormalizedWeights(ConfigRule):
    """`norm_topk_prob`: whether the weights of the chosen experts are made to sum up to 1.

    A softmax over the chosen ones alone is the same; without it the softmax is over all experts.
    """

    default: bool = False
    keys = ("norm_topk_prob",)
    value_types = by_name(norm_topk_prob=bool)

    def read(self, config: Config) -> dict[str, Any]:
        return {"moe_router_pre_softmax": not config.get("norm_topk_prob", self.default)}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {"norm_topk_prob": not provider.moe_router_pre_softmax}


@dataclass(frozen=True)
class SparseLayers(ConfigRule):
    """Which layers have experts: every `decoder_sparse_step`th but those listed in `mlp_only_layers`."""

    keys = ("decoder_sparse_step", "mlp_only_layers")
    value_types = by_name(decoder_sparse_step=Count, mlp_only_layers=list[int] | None)

    def read(self, config: Config) -> dict[str, Any]:
        step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
        num_layers = value_of(config, "num_hidden_layers", REQUIRED)
        pattern = [int((layer + 1) % step == 0 and layer not in dense) for layer in range(num_layers)]
        if not any(pattern):
            raise UnsupportedModelError(
                f"config.json has decoder_sparse_step {step} and mlp_only_layers {dense}:"
                " no layer has experts"
            )
        return {"moe_layer_freq": 1 if all(pattern) else pattern}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        sparse = [layer for layer, has_experts in enumerate(provider.moe_layers) if has_experts]
        step = sparse[0] + 1
        if any((layer + 1) % step for layer in sparse):
            step = 1
        dense = sorted(set(range(step - 1, provider.num_layers, step)) - set(sparse))
        return {"decoder_sparse_step": step, "mlp_only_layers": dense}


def routing_config(
    topk: int, aux_loss_coeff: float | None = None, topk_aliases: tuple[str, ...] = ()
) -> tuple[ConfigRule, ...]:
    """Return the rules of the router's keys, given the defaults of a family, which may have no such loss."""
    coefficient = Field("router_aux_loss_coef", "moe_aux_loss_coeff", default=aux_loss_coeff)
    return (
        Field("num_experts_per_tok", "moe_router_topk", default=topk, aliases=topk_aliases),
        *(() if aux_loss_coeff is None else (coefficient,)),
        # whether a run of transformers adds that loss
        Carried(("output_router_logits",)),
    )


def expert_weights(
    mlp: str = HF_MLP, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Mapping, ...]:
    """Return the rules of router and experts, with the norm in front of them, that are stored one by one."""
    return (
        DirectMapping(
            "decoder.layers.*.pre_mlp_layernorm.weight",
            "model.layers.*.post_attention_layernorm.weight",
            ("hidden_size",),
            layers="moe",
        ),
        DirectMapping(
            f"{MEGATRON_MLP}.router.weight",
            f"{mlp}.gate.weight",
            ("num_moe_experts", "hidden_size"),
            layers="moe",
        ),
        GatedMLPMapping(
            f"{MEGATRON_MLP}.experts.experts.linear_fc1.weight",
            gate=f"{mlp}.experts.*.{gate}.weight",
            up=f"{mlp}.experts.*.{up}.weight",
            shape=("expert_size", "hidden_size"),
            layers="moe",
            experts=True,
        ),
        DirectMapping(
            f"{MEGATRON_MLP}.experts.experts.linear_fc2.weight",
            f"{mlp}.experts.*.{down}.weight",
            ("hidden_size", "expert_size"),
            layers="moe",
            experts=True,
        ),
    )


def shared_expert_weights(name: str) -> tuple[Mapping, ...]:
    """Return the rules of the MLP that sees every token beside the experts."""
    return (
        GatedMLPMapping(
            f"{MEGATRON_MLP}.shared_experts.linear_fc1.weight",
            gate=f"{HF_MLP}.{name}.gate_proj.weight",
            up=f"{HF_MLP}.{name}.up_proj.weight",
            shape=("moe_shared_expert_intermediate_size", "hidden_size"),
            layers="moe",
        ),
        DirectMapping(
            f"{MEGATRON_MLP}.shared_experts.linear_fc2.weight",
            f"{HF_MLP}.{name}.down_proj.weight",
            ("hidden_size", "moe_shared_expert_intermediate_size"),
            layers="moe",
        ),
    )


SHARED_EXPERT_GATE = DirectMapping(
    f"{MEGATRON_MLP}.shared_experts.gate_weight",
    f"{HF_MLP}.shared_expert_gate.weight",
    (1, "hidden_size"),
    layers="moe",
)
