"""Cuts the tensors of a Megatron checkpoint to be into chunks, each made of parts of its source in turn."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bridge.dtypes import ITEM_SIZES
from bridge.mapping import Block, WeightPlan
from bridge.quantization import HfTensor
from bridge.shard_header import TensorSlice

MAX_CHUNK_SIZE = 128 << 20  # bytes; a rank that loads reads whole chunks into memory
SMALL_CHECKPOINT = 64 << 20  # bytes; up to here one file is enough
# Above it eight files for every 4 GiB: a worker writes one file at a time, and a conversion that was
# interrupted goes on from whole files. But not more than a loader would want to open.
GROUP_SIZE = 4 << 30
FILES_PER_GROUP = 8
MAX_FILES = 256


class ByteRange(NamedTuple):
    """`nbytes` bytes from `offset` on of a source file."""

    file: Path
    offset: int
    nbytes: int


class HfRows(NamedTuple):
    """Rows first, first + step, ... of a tensor as blocks count them, which are not bytes to copy."""

    name: str
    first: int
    rows: int
    columns: int
    step: int
    transposed: bool

    def working_size(self, tensor: HfTensor, dtype: str) -> int:
        """Return the bytes of memory that converting one of these rows to `dtype` takes, at the most.

        Per element: what is read, twice if rows are cut out of it or transposed; float32 in between if it is
        dequantised; the result, twice if it has to be laid out anew; masks of the overflow check.
        """
        source = ITEM_SIZES[tensor.dtype] * 2 if isinstance(tensor, TensorSlice) else 16
        return self.columns * (self.step * source + 2 * ITEM_SIZES[dtype] + 4)


class Piece(NamedTuple):
    """What becomes one chunk: `rows` rows from `row` on of `key[lead]`, made of `parts` in turn."""

    key: str
    lead: tuple[int, ...]
    row: int
    rows: int
    nbytes: int
    parts: list[ByteRange | HfRows]

    def box(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return offsets and sizes in the global tensor of `shape`."""
        columns = shape[len(self.lead) + 1 :]
        return (*self.lead, self.row, *(0 for _ in columns)), _box_sizes(len(self.lead), self.rows, columns)


@cache  # most chunks of a large model have the same few sizes
def _box_sizes(num_leads: int, rows: int, columns: tuple[int, ...]) -> tuple[int, ...]:
    return (*(1 for _ in range(num_leads)), rows, *columns)


class ChunkPlanner:
    """Cuts the tensors of one import; a key's tensor gets the dtype that `dtypes` has for it."""

    def __init__(self, plan: WeightPlan, tensors: dict[str, HfTensor], dtypes: dict[str, str]) -> None:
        self._plan = plan
        self._tensors = tensors
        self._dtypes = dtypes

    def pieces(self) -> list[Piece]:
        """Cut every Megatron tensor into chunks of at most MAX_CHUNK_SIZE bytes, layer by layer."""
        by_place: dict[tuple[str, tuple[int, ...]], list[Block]] = defaultdict(list)
        for block in self._plan.blocks:
            by_place[block.key, block.lead].append(block)
        # Layers that differ from one another have their number in the key.
        places = sorted(by_place.items(), key=lambda item: (item[0][1], in_layers(item[0][0])))
        return [
            piece for _, blocks in places for group in _chunk_groups(blocks) for piece in self._cut(group)
        ]

    def _cut(self, blocks: list[Block]) -> Iterator[Piece]:
        key, lead = blocks[0].key, blocks[0].lead
        row_size = math.prod(self._plan.columns(key, lead)) * ITEM_SIZES[self._dtypes[key]]
        limit = max(1, MAX_CHUNK_SIZE // row_size)
        first, last = blocks[0].megatron_row, blocks[-1].megatron_row + blocks[-1].rows
        for row in range(first, last, limit):
            rows = min(limit, last - row)
            parts = [self._part(*overlap, row_size) for overlap in _overlaps(blocks, row, rows)]
            yield Piece(key, lead, row, rows, rows * row_size, parts)

    def _part(self, block: Block, skip: int, rows: int, row_size: int) -> ByteRange | HfRows:
        tensor, transposed = self._tensors[block.hf], block.hf in self._plan.transposed
        first = block.hf_row + skip * block.hf_step
        plain = isinstance(tensor, TensorSlice) and tensor.dtype == self._dtypes[block.key]
        if plain and not transposed and (block.hf_step == 1 or rows == 1):
            assert isinstance(tensor, TensorSlice)
            return ByteRange(tensor.file, tensor.offset + first * row_size, rows * row_size)
        columns = math.prod(self._plan.columns(block.key, block.lead))
        return HfRows(block.hf, first, rows, columns, block.hf_step, transposed)


def in_layers(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names by the numbers in them, names without a number first."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def split_over_files(pieces: list[Piece]) -> list[list[Piece]]:
    """Share pieces out over files of about equal size, in order."""
    total = sum(piece.nbytes for piece in pieces)
    count = 1 if total <= SMALL_CHECKPOINT else min(MAX_FILES, FILES_PER_GROUP * -(-total // GROUP_SIZE))
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


def _overlaps(blocks: list[Block], row: int, rows: int) -> Iterator[tuple[Block, int, int]]:
    """Yield (block, rows to skip, rows to take) for the part of each block in [row, row + rows)."""
    for block in blocks:
        begin, end = max(row, block.megatron_row), min(row + rows, block.megatron_row + block.rows)
        if begin < end:
            yield block, begin - block.megatron_row, end - begin
