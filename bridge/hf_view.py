"""The Hugging Face view of a Megatron checkpoint: its tensors by their Hugging Face names, read in order."""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from bridge.byte_copy import OpenFiles, ThreadBuffer
from bridge.coverage import check_megatron_coverage
from bridge.dtypes import ITEM_SIZES
from bridge.mapping import Block, Shape
from bridge.megatron_checkpoint import MegatronCheckpoint
from bridge.megatron_rows import Lead, RowLocator, Rows, read_rows


class ViewedTensor(NamedTuple):
    """A Hugging Face tensor; its blocks lie in the order of its rows."""

    shape: Shape
    dtype: str
    row_size: int
    blocks: list[Block]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_size


class HfView:
    """The tensors that an export writes, without writing them; every byte located and every shape checked."""

    def __init__(self, checkpoint: MegatronCheckpoint, files: OpenFiles) -> None:
        plan = checkpoint.plan()
        stored = checkpoint.metadata.tensors
        check_megatron_coverage(plan, stored, str(checkpoint.path))
        locator = RowLocator(checkpoint.path, files)
        num_leads = {block.key: len(block.lead) for block in plan.blocks}
        self._files = files
        self._buffer = ThreadBuffer()
        self._rows: dict[tuple[str, Lead], Rows] = {
            (key, lead): rows
            for key in plan.megatron_shapes
            for lead, rows in locator.locate(key, stored[key], num_leads[key]).items()
        }
        blocks: dict[str, list[Block]] = defaultdict(list)
        for block in plan.blocks:
            blocks[block.hf].append(block)
        self.tensors = {
            name: self._viewed(shape, stored[blocks[name][0].key].dtype, blocks[name])
            for name, shape in plan.hf_shapes.items()
        }

    def _viewed(self, shape: Shape, dtype: str, blocks: list[Block]) -> ViewedTensor:
        ordered = sorted(blocks, key=lambda block: block.hf_row)
        row_size = self._rows[ordered[0].key, ordered[0].lead].row_size
        assert sum(block.rows for block in blocks) * row_size == _nbytes(shape, dtype), ordered[0].hf
        return ViewedTensor(shape, dtype, row_size, ordered)

    def read(self, name: str, first: int, count: int) -> Iterator[memoryview]:
        """Yield the bytes of rows [first, first + count) in order; each view is valid until the next."""
        for block in self.tensors[name].blocks:
            begin, end = max(first, block.hf_row), min(first + count, block.hf_row + block.rows)
            if begin < end:
                row = block.megatron_row + begin - block.hf_row
                rows = self._rows[block.key, block.lead]
                yield from read_rows(rows, row, end - begin, self._files, self._buffer.view)

    def place(self, name: str) -> tuple[str, int]:
        """Return the file and the offset where the first of a tensor's bytes lies."""
        block = self.tensors[name].blocks[0]
        rows = self._rows[block.key, block.lead]
        band = next(b for b in rows.bands if b.row <= block.megatron_row < b.row + b.num_rows)
        tile = band.tiles[0]
        return tile.file.name, tile.offset + (block.megatron_row - band.row) * tile.width


def _nbytes(shape: Shape, dtype: str) -> int:
    size = ITEM_SIZES[dtype]
    for dimension in shape:
        size *= dimension
    return size
