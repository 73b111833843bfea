"""A result folder that all ranks write into: made, named and, after an error, removed by the first one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from bridge.agreement import on_first_rank
from bridge.staging import SUFFIX, staged_folder


@contextmanager
def shared_folder(destination: Path, nbytes: int) -> Iterator[Path]:
    """Yield on every rank the folder that becomes `destination` if the block ends well on all of them.

    As `bridge.staging.staged_folder` on the first rank, whose errors are raised on all. An error in the block
    must be one of all ranks.
    """
    with ExitStack() as staged:
        on_first_rank(lambda: staged.enter_context(staged_folder(destination, nbytes)))
        yield destination.with_name(destination.name + SUFFIX)
        torch.distributed.barrier()  # until every rank has written its part
        complete = staged.pop_all()
        on_first_rank(complete.close)
