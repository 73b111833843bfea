"""Which rank sends which rows when the tensors of a sharded model are made whole, and in which bucket.

Every rank of a group makes the same plan from the same boxes, so nothing is said about it on the wire.
"""

import math
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from bridge.dtypes import FLOAT32_KEYS
from bridge.errors import CoverageError
from bridge.mapping import Block, WeightPlan
from bridge.shards import Box, GlobalTensor, overlap

ALIGNMENT = 16  # bytes, of each piece in a bucket: torch views no element across its own size


class Piece(NamedTuple):
    """Rows [first, last) of a global tensor, which `owner` has in `box` and which `block` maps.

    `dtype` is that on the wire.
    """

    owner: int
    box: Box
    block: Block
    first: int
    last: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.last - self.first, *self.box.sizes[1:])

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_size(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def split(self, rows: int) -> tuple["Piece | None", "Piece | None"]:
        """Return the first `rows` rows and the others; None where there are none."""
        middle = min(self.first + rows, self.last)
        return (
            self._replace(last=middle) if middle > self.first else None,
            self._replace(first=middle) if middle < self.last else None,
        )


def plan_pieces(
    plan: WeightPlan,
    boxes: Sequence[Collection[Box]],
    names: Collection[str],
    dtype: torch.dtype | None = None,
) -> dict[str, list[Piece]]:
    """Return the pieces of each named Hugging Face tensor; `boxes` are those of each rank of the group.

    They travel in `dtype`, if they are to be cast to it, where that is the smaller one. Of several ranks that
    hold a box, the one with least to send sends a piece of it. Boxes that do not make up a tensor are a
    CoverageError.
    """
    holders: dict[Box, list[int]] = defaultdict(list)
    for rank, held in enumerate(boxes):
        for box in held:
            holders[box].append(rank)
    at: dict[GlobalTensor, list[Box]] = defaultdict(list)
    for box in sorted(holders, key=lambda box: (box.key, box.lead, box.offsets)):
        at[box.key, box.lead].append(box)
    load = [0] * len(boxes)
    pieces: dict[str, list[Piece]] = {name: [] for name in plan.hf_shapes if name in names}
    for block in plan.blocks:
        for box in at[block.key, block.lead] if block.hf in pieces else ():
            first, last = overlap(block, box)
            if first < last:
                owner = min(holders[box], key=lambda rank: load[rank])
                sent = smaller(box.dtype, cast_dtype(block, dtype))
                piece = Piece(owner, box, block, first, last, sent)
                load[owner] += piece.nbytes
                pieces[block.hf].append(piece)
    _check_complete(plan, pieces)
    return pieces


def cast_dtype(block: Block, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype to cast a block to; what Megatron keeps in float32 is not cast."""
    return None if block.key.endswith(FLOAT32_KEYS) else dtype


def dtype_of(pieces: Sequence[Piece], dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the tensor that pieces make up: `dtype`, or what holds all of them exactly."""
    if (cast := cast_dtype(pieces[0].block, dtype)) is not None:
        return cast
    found = {piece.box.dtype for piece in pieces}
    return found.pop() if len(found) == 1 else torch.float32


def smaller(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    return other if other is not None and other.itemsize < dtype.itemsize else dtype


def _check_complete(plan: WeightPlan, pieces: dict[str, list[Piece]]) -> None:
    for name, parts in pieces.items():
        found, wanted = sum(part.num_elements for part in parts), math.prod(plan.hf_shapes[name])
        if found != wanted:
            raise CoverageError(
                f"the ranks hold {found} elements of {name!r}, which has {wanted}: its ShardedTensors overlap"
                " or leave a gap"
            )


class Placed(NamedTuple):
    """A piece in a bucket: the number of its tensor, and where its bytes begin in its owner's part."""

    tensor: int
    piece: Piece
    offset: int


@dataclass
class Part:
    """What one rank sends in one bucket."""

    placed: list[Placed] = field(default_factory=list)
    size: int = 0

    def add(self, tensor: int, piece: Piece) -> None:
        self.placed.append(Placed(tensor, piece, self.size))
        self.size += aligned(piece.nbytes)


class Buckets:
    """Packs pieces into buckets, in the order of the tensors; iterate over it once.

    Each rank's part of a bucket has up to `part_size` bytes, or one row. A rank whose part is full waits for
    the next bucket while others go on, so that all send about as much, also where whole tensors lie on single
    ranks (pipeline and expert parallelism). Thereby tensors stay incomplete from one bucket to the next:
    together they have at most `open_size` bytes, or are two.
    """

    def __init__(
        self, tensors: Sequence[Sequence[Piece]], num_ranks: int, part_size: int, open_size: int
    ) -> None:
        self._queues: list[deque[tuple[int, Piece]]] = [deque() for _ in range(num_ranks)]
        for number, pieces in enumerate(tensors):
            for piece in pieces:
                self._queues[piece.owner].append((number, piece))
        self._sizes = [sum(piece.nbytes for piece in pieces) for pieces in tensors]
        self._unsent = list(self._sizes)
        self._open: dict[int, int] = {}
        self._part_size = part_size
        self._open_size = open_size

    def __iter__(self) -> Iterator[list[Part]]:
        """Yield the parts of one bucket after the other, by rank."""
        while any(self._queues):
            yield self._fill([Part() for _ in self._queues])

    def _fill(self, parts: list[Part]) -> list[Part]:
        ready = {rank for rank, queue in enumerate(self._queues) if queue}
        while ready:
            rank = min(ready, key=lambda rank: self._queues[rank][0][0])
            taken = self._may_begin(self._queues[rank][0][0]) and self._take(rank, parts[rank])
            if not taken or not self._queues[rank]:
                ready.remove(rank)
        return parts

    def _may_begin(self, tensor: int) -> bool:
        """Say whether a tensor's pieces may be sent; the first incomplete one's always, or all would wait."""
        if tensor in self._open or tensor == min(queue[0][0] for queue in self._queues if queue):
            return True
        return sum(self._open.values()) + self._sizes[tensor] <= self._open_size

    def _take(self, rank: int, part: Part) -> bool:
        """Move the rows that fit from a rank's queue to its part; say whether there were any."""
        tensor, piece = self._queues[rank].popleft()
        rows = max(0, self._part_size - part.size) // piece.row_size
        if rows == 0 and not part.placed:
            rows = 1
        sent, rest = piece.split(rows)
        if rest is not None:
            self._queues[rank].appendleft((tensor, rest))
        if sent is not None:
            part.add(tensor, sent)
            self._note_sent(tensor, sent.nbytes)
        return sent is not None

    def _note_sent(self, tensor: int, nbytes: int) -> None:
        self._unsent[tensor] -= nbytes
        if self._unsent[tensor]:
            self._open[tensor] = self._sizes[tensor]
        else:
            self._open.pop(tensor, None)


def aligned(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNMENT
