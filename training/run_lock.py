"""One run at a time in a checkpoint folder: a second one would remove what the first is writing."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bridge.agreement import answer_of_first_rank
from bridge.folder_lock import locked

REFUSAL = "gets the checkpoints of another run: wait for that one, stop it, or give another checkpoint.save"
# seconds in which the forks of a killed run end, which share its lock
PATIENCE = 10.0


@contextmanager
def sole_run(save: str | None) -> Iterator[None]:
    """Keep other runs of this machine off the folder `save`; all ranks enter together, the first locks."""
    with ExitStack() as held:
        if save is not None:
            answer_of_first_rank(partial(lock, Path(save), held))
        yield


def lock(folder: Path, held: ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(folder, REFUSAL, PATIENCE))
