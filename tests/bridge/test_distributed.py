"""Groups of ranks, in a process that builds one layout after another."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from megatron.core import parallel_state

from bridge import distributed
from bridge.provider import GPTModelProvider


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_layouts_that_are_given_up_do_not_pile_up() -> None:
    distributed.start_process_group()
    before, left = num_threads(), []
    for _ in range(3):
        distributed.initialize(GPTModelProvider())
        built = num_threads() - before
        distributed.leave_model_parallel()
        assert not parallel_state.model_parallel_is_initialized()
        left.append(num_threads() - before)
    assert built > 30
    # Megatron's destroy_model_parallel holds on to two groups, until there are others in their place
    assert max(left) <= 6
