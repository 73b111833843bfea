"""The Hugging Face view of a Megatron checkpoint: its tensors by their Hugging Face names, read in order."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from bridge.byte_copy import BUFFER_SIZE, OpenFiles, ThreadBuffer
from bridge.coverage import check_megatron_coverage
from bridge.dtypes import FLOAT32_KEYS, ITEM_SIZES, common_dtype
from bridge.errors import CoverageError
from bridge.mapping import Block, Shape, WeightPlan
from bridge.megatron_checkpoint import MegatronCheckpoint
from bridge.megatron_rows import Lead, RowLocator, Rows, read_rows
from bridge.memory import MAX_PART_SIZE, MIN_BUFFER_SIZE, MemoryLimit
from bridge.torch_dist.checksums import ItemChecks


class ViewedTensor(NamedTuple):
    """A Hugging Face tensor as `num_rows` rows in the order of its bytes, and the blocks it is made of.

    The blocks lie in the order of their rows. With `computed` their bytes are not those of the tensor.
    """

    shape: Shape
    dtype: str
    num_rows: int
    row_size: int
    blocks: list[Block]
    computed: bool
    transposed: bool

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.row_size


class HfView:
    """The tensors that an export writes, without writing them; every byte located and every shape checked."""

    def __init__(self, checkpoint: MegatronCheckpoint, files: OpenFiles, dtype: str | None = None) -> None:
        """`dtype` casts every tensor but those that Megatron keeps in float32."""
        self.plan = plan = checkpoint.plan()
        stored = checkpoint.metadata.tensors
        check_megatron_coverage(plan, stored, checkpoint.padding, str(checkpoint.path))
        locator = RowLocator(checkpoint.path, files)
        num_leads = {block.key: len(block.lead) for block in plan.blocks}
        self.part_size = MAX_PART_SIZE
        self._files = files
        self._buffer = ThreadBuffer()
        self._checks = ItemChecks()
        self._dtype = dtype
        self._rows: dict[tuple[str, Lead], Rows] = {
            (key, lead): rows
            for key in plan.megatron_shapes
            for lead, rows in locator.locate(key, stored[key], num_leads[key]).items()
        }
        self.tensors = self._view(plan)

    def _view(self, plan: WeightPlan) -> dict[str, ViewedTensor]:
        blocks: dict[str, list[Block]] = defaultdict(list)
        for block in plan.blocks:
            blocks[block.hf].append(block)
        tensors = {
            name: self._viewed(
                shape, sorted(blocks[name], key=lambda block: block.hf_row), name in plan.transposed
            )
            for name, shape in plan.hf_shapes.items()
        }
        return tensors | {name: tensors[plan.tied[name]] for name in sorted(plan.copies)}

    def _viewed(self, shape: Shape, blocks: list[Block], transposed: bool) -> ViewedTensor:
        stored = {(block.key, block.lead): self._rows[block.key, block.lead] for block in blocks}
        dtypes = {rows.dtype for rows in stored.values()}
        kept = self._dtype is None or blocks[0].key.endswith(FLOAT32_KEYS)
        dtype = common_dtype(dtypes) if kept else str(self._dtype)
        first = self._rows[blocks[0].key, blocks[0].lead]
        columns = shape[-1] if transposed else first.row_size // ITEM_SIZES[first.dtype]
        num_rows = math.prod(shape) // columns
        mapped = sum(block.rows for block in blocks)
        if not transposed and mapped != num_rows:
            raise CoverageError(f"the family's rules map {mapped} of the {num_rows} rows of {blocks[0].hf!r}")
        strided = any(block.hf_step > 1 and block.rows > 1 for block in blocks)
        computed = transposed or strided or dtypes != {dtype}
        return ViewedTensor(shape, dtype, num_rows, columns * ITEM_SIZES[dtype], blocks, computed, transposed)

    def fit(self, memory: MemoryLimit, workers: int) -> int:
        """Keep to a limit of memory: return how many of the workers may read at a time."""
        computed = [self._row_cost(tensor) for tensor in self.tensors.values() if tensor.computed]
        if computed:
            import torch  # noqa: F401 -- now, so that what it takes is counted
        tiled = (rows.row_size for rows in self._rows.values() if any(len(b.tiles) > 1 for b in rows.bands))
        least = max((MIN_BUFFER_SIZE, *computed, *tiled))
        workers, size = memory.share(workers, least, MAX_PART_SIZE if computed else max(least, BUFFER_SIZE))
        self.part_size, self._buffer = size, ThreadBuffer(min(size, BUFFER_SIZE))
        return workers

    def _row_cost(self, tensor: ViewedTensor) -> int:
        elements = tensor.row_size // ITEM_SIZES[tensor.dtype]
        return (
            2 * tensor.row_size + 8 * elements
        )  # rows as stored, at most 4 bytes, and the masks of the cast

    def read(self, name: str, first: int, count: int) -> Iterator[memoryview]:
        """Yield the bytes of rows [first, first + count) in order; each view is valid until the next.

        Rows are read once: a stored item that has been read as a whole is held against its CRC-32.
        """
        if self.tensors[name].computed:
            yield from self._read_computed(name, first, count)
            return
        checks = self._checks_of(name)
        for block in self.tensors[name].blocks:
            begin, end = max(first, block.hf_row), min(first + count, block.hf_row + block.rows)
            if begin < end:
                row = block.megatron_row + begin - block.hf_row
                rows = self._rows[block.key, block.lead]
                yield from read_rows(rows, row, end - begin, self._files, self._buffer.view, checks)

    def _checks_of(self, name: str) -> ItemChecks | None:
        """Of what is read once and by whole rows: not the copy of another tensor, not a transposed one."""
        checked = name in self.plan.hf_shapes and not self.tensors[name].transposed
        return self._checks if checked else None

    def _read_computed(self, name: str, first: int, count: int) -> Iterator[memoryview]:
        from bridge.hf_rows import bytes_of  # torch, only where bytes are not enough
        from bridge.megatron_boxes import RowAssembler

        tensor = self.tensors[name]
        parts = [(block, self._rows[block.key, block.lead]) for block in tensor.blocks]
        assembler = RowAssembler(name, tensor.dtype, self._files, self._checks_of(name))
        step = max(1, self.part_size // self._row_cost(tensor))
        width = tensor.row_size // ITEM_SIZES[tensor.dtype]
        height = tensor.shape[-2] if tensor.transposed else tensor.num_rows
        row = first
        while row < first + count:
            matrix, begin = divmod(row, height)
            rows = range(begin, min(begin + step, height, begin + first + count - row))
            if tensor.transposed:
                box = assembler.box(parts, range(matrix * width, (matrix + 1) * width), rows).T.contiguous()
            else:
                box = assembler.box(parts, rows, range(width))
            yield bytes_of(box)
            row += len(rows)

    def place(self, name: str) -> tuple[str, int]:
        """Return the file and the offset where the first of a tensor's bytes lies."""
        block = self.tensors[name].blocks[0]
        rows = self._rows[block.key, block.lead]
        band = next(b for b in rows.bands if b.row <= block.megatron_row < b.row + b.num_rows)
        tile = band.tiles[0]
        return tile.file.name, tile.offset + (block.megatron_row - band.row) * tile.width
