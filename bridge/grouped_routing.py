"""Rules of experts as DeepSeek has them: dense layers first, shared experts, a choice by groups."""

from dataclasses import dataclass
from typing import Any

from bridge.config_rules import Config, ConfigRule, value_of
from bridge.errors import UnsupportedModelError
from bridge.experts import HF_MLP, MEGATRON_MLP
from bridge.mapping import DirectMapping
from bridge.provider import GPTModelProvider
from bridge.value_types import Count, by_name


@dataclass(frozen=True)
class DenseFirst(ConfigRule):
    """`first_k_dense_replace`: layers from that number on have `n_routed_experts` experts each.

    `dense` and `experts` are the defaults.
    """

    dense: int
    experts: int
    keys = ("first_k_dense_replace", "n_routed_experts")
    value_types = by_name(first_k_dense_replace=int, n_routed_experts=Count)

    def read(self, config: Config) -> dict[str, Any]:
        num_layers = value_of(config, "num_hidden_layers", None)
        dense = config.get("first_k_dense_replace", self.dense)
        if dense >= num_layers:
            raise UnsupportedModelError(
                f"config.json has first_k_dense_replace {dense} and num_hidden_layers {num_layers}: no"
                " layer has experts"
            )
        pattern = [int(layer >= dense) for layer in range(num_layers)]
        experts = config.get("n_routed_experts", self.experts)
        return {"num_moe_experts": experts, "moe_layer_freq": pattern if dense else 1}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        dense = provider.moe_layers.count(False)
        if any(provider.moe_layers[:dense]):
            raise UnsupportedModelError(
                f"model.moe_layer_freq is {provider.moe_layer_freq}: in a {provider.hf_model_type!r} model"
                " the dense layers come first"
            )
        return {"first_k_dense_replace": dense, "n_routed_experts": provider.num_moe_experts}


@dataclass(frozen=True)
class SharedExperts(ConfigRule):
    """`n_shared_experts` of `moe_intermediate_size` see every token: one MLP that many times as wide."""

    size: int
    shared: int
    keys = ("moe_intermediate_size", "n_shared_experts")
    value_types = by_name(moe_intermediate_size=Count, n_shared_experts=int | None)

    def read(self, config: Config) -> dict[str, Any]:
        size = config.get("moe_intermediate_size", self.size)
        shared = config.get("n_shared_experts", self.shared) or 0
        return {
            "moe_ffn_hidden_size": size,
            "moe_shared_expert_intermediate_size": size * shared or None,
        }

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        size = provider.moe_ffn_hidden_size or provider.ffn_hidden_size
        shared, rest = divmod(provider.moe_shared_expert_intermediate_size or 0, size)
        if rest:
            raise UnsupportedModelError(
                f"model.moe_shared_expert_intermediate_size is {shared * size + rest}: a"
                f" {provider.hf_model_type!r} model has a multiple of moe_ffn_hidden_size, {size}"
            )
        return {"moe_intermediate_size": size, "n_shared_experts": shared}


@dataclass(frozen=True)
class GroupLimit(ConfigRule):
    """`n_group` and `topk_group`: a token's experts are in its best groups of experts, so many of them.

    A group counts by the sum of the scores of its best `members` experts. Megatron has None for no limit.
    """

    groups: int | None
    chosen: int | None
    members: int
    keys = ("n_group", "topk_group")
    value_types = by_name(n_group=Count | None, topk_group=Count | None)

    def read(self, config: Config) -> dict[str, Any]:
        groups = config.get("n_group", self.groups) or 1
        chosen = config.get("topk_group", self.chosen) or 1
        if groups == chosen:
            return {"moe_router_num_groups": None, "moe_router_group_topk": None}
        return {
            "moe_router_num_groups": groups,
            "moe_router_group_topk": chosen,
            "moe_router_group_members": self.members,
        }

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        groups, chosen = provider.moe_router_num_groups or 1, provider.moe_router_group_topk or 1
        return {"n_group": groups, "topk_group": chosen}


@dataclass(frozen=True)
class GreedyGroupLimit(GroupLimit):
    """The same where `topk_method` says whether there is such a limit (DeepSeek-V2)."""

    keys = ("n_group", "topk_group", "topk_method")  # type: ignore[assignment]

    def read(self, config: Config) -> dict[str, Any]:
        method = config.get("topk_method", "greedy")
        if method == "greedy":
            return {"moe_router_num_groups": None, "moe_router_group_topk": None}
        if method != "group_limited_greedy":
            raise UnsupportedModelError(
                f"config.json has topk_method {method!r}: this family supports 'greedy' and"
                " 'group_limited_greedy'"
            )
        return super().read(config)

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        limited = provider.moe_router_num_groups is not None
        return {**super().write(provider), "topk_method": "group_limited_greedy" if limited else "greedy"}


@dataclass(frozen=True)
class NormalizedSigmoid(ConfigRule):
    """`norm_topk_prob`: with sigmoid scores Megatron always makes the chosen experts' weights sum up to 1.

    Except where one is chosen (megatron/core/transformer/moe/moe_utils.py,
    topk_routing_with_score_function).
    """

    keys = ("norm_topk_prob",)

    def read(self, config: Config) -> dict[str, Any]:
        normalized, chosen = config.get("norm_topk_prob", True), config.get("num_experts_per_tok")
        if normalized is not True or chosen == 1:
            raise UnsupportedModelError(
                f"config.json has norm_topk_prob {normalized!r} and num_experts_per_tok {chosen!r}: this"
                " family supports True and 2 or more"
            )
        return {}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {"norm_topk_prob": True}


EXPERT_BIAS = DirectMapping(
    f"{MEGATRON_MLP}.router.expert_bias",
    f"{HF_MLP}.gate.e_score_correction_bias",
    ("num_moe_experts",),
    layers="moe",
)
"""What is added to the scores for the choice of experts, to balance their loads; float32 on both sides."""
