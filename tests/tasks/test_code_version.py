"""What of the installed code makes a step run again."""

import importlib.metadata
from collections.abc import Iterator

import pytest

from tasks.chain import CHAIN
from tasks.code_version import code_record, installed_version


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    installed_version.cache_clear()
    yield
    installed_version.cache_clear()


def test_what_is_not_installed_is_part_of_the_record() -> None:
    found = code_record((), ("torch", "a-package-that-nobody-has"))["versions"]
    assert found == {"torch": importlib.metadata.version("torch"), "a-package-that-nobody-has": None}


@pytest.mark.parametrize("distribution", ["torch", "megatron-core", "transformer-engine"])
def test_what_computes_counts_for_every_step_that_computes(distribution: str) -> None:
    computing = [step.name for step in CHAIN if distribution in step.distributions]
    assert [name for name in computing if name != "build_dataset"] == ["check_import", "train", "verify"]
