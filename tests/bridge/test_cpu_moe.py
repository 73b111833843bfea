"""What the layouts of whole models in test_layouts.py do not reach."""

from typing import Any

import pytest
import torch
from process_groups import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(2, "bridge_jobs.experts_job", {}, tmp_path_factory.mktemp("experts"))


def test_parts_of_different_sizes_are_gathered_and_scattered(found: dict[str, Any]) -> None:
    """Experts and tensor parallelism together need it, from four ranks on."""
    assert found["gathered"] == [[1.0, 1.0]] * 3 + [[2.0, 2.0]]
    # each rank adds what both have gathered
    assert found["scattered"] == [[2.0, 2.0]] * 3
    # two ranks gathered it, the first of them weighs it by 1
    assert found["gradient"] == [[2.0, 2.0]] * 3


def test_the_balancing_loss_weighs_the_same_where_ranks_share_a_sequence(found: dict[str, Any]) -> None:
    gradient, expected = map(torch.tensor, found["balance"])
    torch.testing.assert_close(gradient, expected)
