import dataclasses
import math

import pytest

from bridge.gates import LogitsMetrics, judge_logits

PERFECT = LogitsMetrics(
    max_abs=0.0, mean_abs=0.0, kl=0.0, top1_agreement=1.0, top5_agreement=1.0, cosine=1.0, scale=1.0
)


def test_equal_logits_pass() -> None:
    verdict = judge_logits(PERFECT, "float32")
    assert verdict["passed"]
    assert verdict["failures"] == []


@pytest.mark.parametrize("value", [0.5, math.nan])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LogitsMetrics)][:-1])
def test_each_metric_alone_fails_the_gate(name: str, value: float) -> None:
    verdict = judge_logits(dataclasses.replace(PERFECT, **{name: value}), "float32")
    assert not verdict["passed"]
    assert len(verdict["failures"]) == 1
    assert verdict["failures"][0].startswith(f"{name} is ")


def test_absolute_differences_are_measured_against_the_scale() -> None:
    off = dataclasses.replace(PERFECT, max_abs=2e-3)
    assert not judge_logits(off, "float32")["passed"]
    assert judge_logits(dataclasses.replace(off, scale=30.0), "float32")["passed"]
