import dataclasses
import math

import pytest
import torch

from bridge.differences import position_rows, summarize
from bridge.gates import LogitsMetrics, LogitsThresholds, judge_hidden_states, judge_logits

PERFECT = LogitsMetrics(
    max_abs=0.0, mean_abs=0.0, kl=0.0, top1_agreement=1.0, top5_agreement=1.0, cosine=1.0, scale=1.0
)
JUDGED = [field.name for field in dataclasses.fields(LogitsThresholds)]


def test_equal_logits_pass() -> None:
    verdict = judge_logits(PERFECT, "float32")
    assert verdict["passed"]
    assert verdict["failures"] == []


@pytest.mark.parametrize("value", [0.5, math.nan])
@pytest.mark.parametrize("name", JUDGED)
def test_each_metric_alone_fails_the_gate(name: str, value: float) -> None:
    verdict = judge_logits(dataclasses.replace(PERFECT, **{name: value}), "float32")
    assert not verdict["passed"]
    assert len(verdict["failures"]) == 1
    assert verdict["failures"][0].startswith(f"{name} is ")


def one_logit(logits: torch.Tensor) -> None:
    logits[5, 100] += 2e-4 * logits.abs().max()


def every_logit(logits: torch.Tensor) -> None:
    logits[:, ::2] += 5e-5 * logits.abs().max()


def likely_logits_beside_a_huge_one(logits: torch.Tensor) -> None:
    """Some checkpoints give unused tokens logits of minus thousands, beside which a wrong 0.05 is little."""
    likeliest = logits.topk(4, dim=-1).indices
    logits.scatter_add_(-1, likeliest, torch.tensor([0.05, -0.05, 0.05, -0.05]).expand(len(logits), 4))


@pytest.mark.parametrize(
    ("fault", "only"),
    [(one_logit, "max_abs"), (every_logit, "mean_abs"), (likely_logits_beside_a_huge_one, "kl")],
)
def test_each_metric_sees_a_fault_that_no_other_one_sees(fault, only: str) -> None:
    logits = torch.randn(16, 1000, generator=torch.Generator().manual_seed(0))
    if only == "kl":
        logits[:, 999] = -1000.0
    changed = logits.clone()
    fault(changed)
    rows = position_rows(0, [0] * 16, logits, changed)
    verdict = judge_logits(summarize(rows), "float32")
    assert [line.split()[0] for line in verdict["failures"]] == [only]


def test_absolute_differences_are_measured_against_the_scale() -> None:
    off = dataclasses.replace(PERFECT, max_abs=2e-3)
    assert not judge_logits(off, "float32")["passed"]
    assert judge_logits(dataclasses.replace(off, scale=30.0), "float32")["passed"]


@pytest.mark.parametrize(
    ("relative", "parts_at", "words"),
    [
        ([0.0, 1e-6, 1e-5], None, None),
        ([0.0, 1e-6, 2e-4], 2, "at layer 2 of 2: by 0.0002"),
        ([2e-4, 2e-4, 0.0], 0, "before layer 1 of 2"),
        ([0.0, math.nan, 2e-4], 1, "at layer 1 of 2: by nan"),
    ],
)
def test_the_first_layer_over_the_threshold_is_named(
    relative: list[float], parts_at: int | None, words: str | None
) -> None:
    verdict = judge_hidden_states(relative, "float32")
    assert verdict["parts_at"] == parts_at
    assert verdict["passed"] == (parts_at is None)
    assert [words in line for line in verdict["failures"]] == ([True] if words else [])
