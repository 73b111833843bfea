"""The heartbeat of a rank: where it is in the run, noted in memory and published in a small file."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bridge.job import write_json

DATA, BATCH, OPTIMIZER, EVALUATION = "data", "forward and backward", "optimizer", "evaluation"


@dataclass
class Heart:
    """Where this rank is; a beat costs less than a microsecond.

    `limited` says whether the present phase has to end within the hang timeout: not in the first iteration of
    a start, which compiles, nor in what writes to disk.
    """

    iteration: int = 0
    phase: str = "start"
    since: float = field(default_factory=time.time)
    limited: bool = False
    beats: int = 0
    is_warm: bool = False

    def beat(self, phase: str, *, limited: bool = True) -> None:
        """Note that a phase begins."""
        self.phase, self.limited, self.since = phase, limited and self.is_warm, time.time()
        self.beats += 1


class BeatingData:
    """An iterator whose user beats when it asks for data, and again when they are there."""

    def __init__(self, batches: Iterator[Any], heart: Heart, phase: str = BATCH) -> None:
        self._batches, self._heart, self._phase = batches, heart, phase

    def __iter__(self) -> "BeatingData":
        return self

    def __next__(self) -> Any:
        self._heart.beat(DATA)
        batch = next(self._batches)
        self._heart.beat(self._phase)
        return batch


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last published; times are in seconds since 1970."""

    rank: int
    host: str
    pid: int
    parent: int
    iteration: int
    phase: str
    since: float
    limited: bool
    hangs: bool
    published: float

    @property
    def place(self) -> str:
        """Say where the rank is."""
        return f"{self.phase} of iteration {self.iteration}"


def publish(folder: Path, rank: int, heart: Heart, *, hangs: bool) -> None:
    """Write this rank's heartbeat, for the other ranks."""
    beat = Heartbeat(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        parent=os.getppid(),
        iteration=heart.iteration,
        phase=heart.phase,
        since=heart.since,
        limited=heart.limited,
        hangs=hangs,
        published=time.time(),
    )
    write_json(heartbeat_file(folder, rank), asdict(beat))


def read_heartbeats(folder: Path, ranks: int) -> list[Heartbeat]:
    """Return what was last published, by rank; nodes that do not see this folder are missing."""
    beats = []
    for rank in range(ranks):
        with suppress(FileNotFoundError):  # also that of a rank which has just finished
            beats.append(Heartbeat(**json.loads(heartbeat_file(folder, rank).read_text())))
    return beats


def heartbeat_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.stacks.txt"


def asked_stack_file(folder: Path, rank: int) -> Path:
    """Return the file for the stack of a rank's main thread, when another rank asks for it."""
    return folder / f"rank{rank}.asked_stack.txt"


def guilty(heartbeats: list[Heartbeat], alive_after: float) -> Heartbeat:
    """Return the rank that the others most likely wait for.

    That is one which no longer publishes (not after `alive_after`), else the one in the earliest iteration,
    else one that waits for its data, as that is the only phase which waits for no other rank, else the one
    that has been where it is for longest: the others still moved until they needed it.
    """

    def order(beat: Heartbeat) -> tuple[bool, int, bool, float]:
        return (beat.published > alive_after, beat.iteration, beat.phase != DATA, beat.since)

    return min(heartbeats, key=order)
