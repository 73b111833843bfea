"""The choice of experts by groups where Megatron Core's own counts a group differently."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bridge.errors import ConfigError
from bridge.expert_router import ExpertRouter
from bridge.provider import GPTModelProvider


def needs_group_router(provider: GPTModelProvider) -> bool:
    """Say whether Megatron would count groups by another number of experts: by topk // group_topk."""
    if provider.moe_router_group_topk is None:
        return False
    return provider.moe_router_topk // provider.moe_router_group_topk != provider.moe_router_group_members


class GroupRouter(ExpertRouter):
    """Megatron's router with groups that count by the sum of their best `members` experts' scores."""

    def __init__(self, config: Any, *args: Any, members: int, **options: Any) -> None:
        super().__init__(config, *args, **options)
        if config.moe_router_fusion:
            raise ConfigError(
                "model.moe_router_fusion counts groups of experts in another way than this model:"
                " switch it off"
            )
        # The one place where moe_utils.topk_routing_with_score_function asks for another choice of experts.
        self.router_replay = GroupChoice(members)


class GroupChoice:
    """Takes the place of Megatron's RouterReplay to choose experts from the best groups."""

    def __init__(self, members: int) -> None:
        self.members = members

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int, group_topk: int, default: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """Return scores and indices [tokens, topk] of the chosen experts from scores [tokens, experts]."""
        groups = scores.unflatten(-1, (num_groups, -1))
        worth = groups.topk(self.members, dim=-1).values.sum(dim=-1)
        chosen = torch.zeros_like(worth, dtype=torch.bool)
        chosen.scatter_(1, worth.topk(group_topk, dim=-1).indices, True)
        allowed = groups.masked_fill(~chosen[..., None], float("-inf")).flatten(1)
        values, indices = allowed.topk(topk, dim=-1)
        return values, indices
