"""The checks that `bridgeworks families` shows are those that the suite runs."""

import re
from pathlib import Path

import pytest
from bridge_jobs import layouts_job

from bridge.families import families, family_named
from bridge.family_checks import CONVERSION, DENSE_LAYOUTS, EXPERT_LAYOUTS, checks_of, families_with

TESTS = Path(__file__).parent


def test_each_layout_is_one_that_the_job_knows() -> None:
    assert {*DENSE_LAYOUTS, *EXPERT_LAYOUTS} <= set(layouts_job.LAYOUTS)


@pytest.mark.parametrize("check", CONVERSION)
def test_each_check_names_the_cases_of_a_test(check: str) -> None:
    sources = "".join(file.read_text() for file in TESTS.glob("test_*.py") if file != Path(__file__))
    assert re.search(rf'parametrize\("\w+", families_with\("{check}"\)\)', sources)


@pytest.mark.parametrize("model_type", families())
def test_a_family_is_checked_in_full_somewhere(model_type: str) -> None:
    checks = checks_of(family_named(model_type))
    assert {*CONVERSION, "dp2", "pp2"} <= set(checks)
    assert {"tp2 sequence parallel", "tp2 ep2"} & set(checks)
    assert set(family_named(model_type).needs_gpu) <= set(checks)
    for check, place in checks.items():
        assert model_type in families_with(check, place)


def test_experts_are_spread_over_ranks() -> None:
    assert "ep2" in checks_of(family_named("mixtral"))
    assert "ep2" not in checks_of(family_named("llama"))
