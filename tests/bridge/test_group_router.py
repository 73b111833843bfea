import itertools
from typing import Any

import pytest
import torch

from bridge.group_router import GroupChoice, needs_group_router
from bridge.provider import GPTModelProvider


def best_experts(scores: list[float], topk: int, num_groups: int, group_topk: int, members: int) -> set[int]:
    """Try every choice of groups for the one that counts most, and take its best experts."""
    size = len(scores) // num_groups
    groups = [list(range(first, first + size)) for first in range(0, len(scores), size)]

    def worth(group: list[int]) -> float:
        return sum(sorted((scores[expert] for expert in group), reverse=True)[:members])

    chosen = max(itertools.combinations(groups, group_topk), key=lambda choice: sum(map(worth, choice)))
    return set(sorted(itertools.chain(*chosen), key=lambda expert: -scores[expert])[:topk])


@pytest.mark.parametrize(
    ("topk", "num_groups", "group_topk", "members"), [(6, 8, 3, 1), (8, 8, 4, 2), (3, 2, 1, 3)]
)
def test_experts_come_from_the_best_groups(topk: int, num_groups: int, group_topk: int, members: int) -> None:
    scores = torch.rand(40, 32, generator=torch.Generator().manual_seed(0))
    values, indices = GroupChoice(members).get_replay_topk(scores, topk, num_groups, group_topk, None)
    torch.testing.assert_close(values, scores.gather(1, indices))
    for row, found in zip(scores.tolist(), indices.tolist(), strict=True):
        assert set(found) == best_experts(row, topk, num_groups, group_topk, members)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"moe_router_topk": 8, "moe_router_group_topk": 4, "moe_router_group_members": 2}, False),
        ({"moe_router_topk": 6, "moe_router_group_topk": 3, "moe_router_group_members": 1}, True),
        ({"moe_router_topk": 6, "moe_router_group_topk": None, "moe_router_group_members": 1}, False),
    ],
)
def test_megatrons_own_router_is_kept_where_it_is_right(values: dict[str, Any], expected: bool) -> None:
    """DeepSeek-V3's, DeepSeek-V2's, and that of a model without groups."""
    assert needs_group_router(GPTModelProvider(**values)) == expected
