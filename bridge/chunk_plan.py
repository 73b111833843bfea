"""Cuts the tensors of a Megatron checkpoint to be into chunks, each a list of byte ranges of its source."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bridge.dtypes import ITEM_SIZES
from bridge.hf_checkpoint import TensorSlice
from bridge.mapping import Block, WeightPlan

MAX_CHUNK_SIZE = 128 << 20  # bytes; a rank that loads reads whole chunks into memory
SMALL_CHECKPOINT = 64 << 20  # bytes; up to here one file is enough
# Above it eight files for every 4 GiB: a worker writes one file at a time.
GROUP_SIZE = 4 << 30
FILES_PER_GROUP = 8


class ByteRange(NamedTuple):
    """`nbytes` bytes from `offset` on of a source file."""

    file: Path
    offset: int
    nbytes: int


class Piece(NamedTuple):
    """What becomes one chunk: `rows` rows from `row` on of `key[lead]`, read from `ranges` in turn."""

    key: str
    lead: tuple[int, ...]
    row: int
    rows: int
    nbytes: int
    ranges: list[ByteRange]

    def box(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return offsets and sizes in the global tensor of `shape`."""
        columns = shape[len(self.lead) + 1 :]
        return (*self.lead, self.row, *(0 for _ in columns)), (*(1 for _ in self.lead), self.rows, *columns)


def plan_pieces(plan: WeightPlan, tensors: dict[str, TensorSlice]) -> list[Piece]:
    """Cut every Megatron tensor into chunks of at most MAX_CHUNK_SIZE bytes, in the order of the layers."""
    by_place: dict[tuple[str, tuple[int, ...]], list[Block]] = defaultdict(list)
    for block in plan.blocks:
        by_place[block.key, block.lead].append(block)
    pieces: list[Piece] = []
    for (key, lead), blocks in sorted(by_place.items(), key=lambda item: item[0][1]):
        columns = math.prod(plan.megatron_shapes[key][len(lead) + 1 :])
        row_size = columns * ITEM_SIZES[tensors[blocks[0].hf].dtype]
        for group in _chunk_groups(blocks):
            pieces.extend(_pieces_of(group, tensors, row_size))
    return pieces


def split_over_files(pieces: list[Piece]) -> list[list[Piece]]:
    """Share pieces out over files of about equal size, in order."""
    total = sum(piece.nbytes for piece in pieces)
    count = 1 if total <= SMALL_CHECKPOINT else FILES_PER_GROUP * -(-total // GROUP_SIZE)
    files: list[list[Piece]] = [[] for _ in range(count)]
    position = 0
    for piece in pieces:
        files[min(count - 1, position * count // max(1, total))].append(piece)
        position += piece.nbytes
    return [file for file in files if file]


def _chunk_groups(blocks: list[Block]) -> list[list[Block]]:
    """Give tensors that lie one below the other, gate and up, a chunk each: ranks load halves of both."""
    blocks = sorted(blocks, key=lambda block: block.megatron_row)
    for previous, block in itertools.pairwise(blocks):
        assert previous.megatron_row + previous.rows == block.megatron_row, (
            f"rules leave a gap in {block.key}"
        )
    stacked = len({block.hf for block in blocks}) == len(blocks)
    return [[block] for block in blocks] if stacked else [blocks]


def _pieces_of(blocks: list[Block], tensors: dict[str, TensorSlice], row_size: int) -> Iterator[Piece]:
    limit = max(1, MAX_CHUNK_SIZE // row_size)
    first, last = blocks[0].megatron_row, blocks[-1].megatron_row + blocks[-1].rows
    for row in range(first, last, limit):
        rows = min(limit, last - row)
        ranges = [
            _byte_range(tensors[block.hf], block.hf_row + skip, count, row_size)
            for block, skip, count in _overlaps(blocks, row, rows)
        ]
        yield Piece(blocks[0].key, blocks[0].lead, row, rows, rows * row_size, ranges)


def _byte_range(tensor: TensorSlice, row: int, rows: int, row_size: int) -> ByteRange:
    return ByteRange(tensor.file, tensor.offset + row * row_size, rows * row_size)


def _overlaps(blocks: list[Block], row: int, rows: int) -> Iterator[tuple[Block, int, int]]:
    """Yield (block, rows to skip, rows to take) for the part of each block in [row, row + rows)."""
    for block in blocks:
        begin, end = max(row, block.megatron_row), min(row + rows, block.megatron_row + block.rows)
        if begin < end:
            yield block, begin - block.megatron_row, end - begin
