"""What ranks come to know of each other; one job of two ranks answers the tests of several."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from process_groups import run_ranks

from bridge import distributed
from bridge.agreement import answer_of_first_rank, first_of_all, on_every_rank, on_first_rank
from bridge.errors import ConfigError, OtherRankError
from bridge.job import failure

FOREIGN = "OSError: the disk\nis away"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(2, "bridge_jobs.agreement_job", {}, tmp_path_factory.mktemp("agreement"))


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("ours of one", "ConfigError: rank 1: is wrong", "ConfigError: rank 1: is wrong"),
        ("ours of both", "ConfigError: rank 0: is wrong", "ConfigError: rank 0: is wrong"),
        ("another's of one", "OtherRankError: rank 1: OSError: the disk is away", FOREIGN),
        ("no error", None, None),
        ("ours of the first", "ConfigError: rank 0: is wrong", "ConfigError: rank 0: is wrong"),
        ("another's of the first", FOREIGN, "OtherRankError: rank 0: OSError: the disk is away"),
        ("done by the first", [0], []),
        ("answer", [0], [0]),
        ("answer refused", "ConfigError: is wrong", "ConfigError: is wrong"),
        ("answer failed", FOREIGN, "the next answer"),
        ("first of all", "of 0", "of 0"),
        ("only of the second", "of 1", "of 1"),
        ("of none", None, None),
    ],
)
def test_two_ranks(case: str, first: Any, second: Any, said: dict[str, Any]) -> None:
    assert said[case] == [first, second]


def test_what_another_rank_met_is_no_verdict() -> None:
    """Or the launcher would not start a job again after an error of one rank's disk."""
    assert failure(ConfigError("is wrong"), 2)["error"]["verdict"]
    assert not failure(OtherRankError(f"rank 1: {FOREIGN}"), 1)["error"]["verdict"]


@pytest.fixture
def single_process() -> Iterator[None]:
    distributed.start_process_group()
    yield
    distributed.finalize()


def refuse() -> None:
    raise ConfigError("is wrong")


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("ask", [on_every_rank, on_first_rank, answer_of_first_rank])
def test_a_single_process_is_not_named(ask: Callable[[Callable[[], None]], None]) -> None:
    with pytest.raises(ConfigError, match=r"^is wrong$"):
        ask(refuse)


@pytest.mark.usefixtures("single_process")
def test_a_single_process_has_its_own_answer() -> None:
    assert answer_of_first_rank(lambda: 3) == 3
    assert first_of_all("mine") == "mine"
