"""Where a live model's weights come from: a Megatron checkpoint or a Hugging Face folder, both mapped.

A source fills one shard at a time, in place, from the pages that hold its part of the global tensor.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from bridge.byte_copy import OpenFiles
from bridge.contained_path import contained_file
from bridge.coverage import check_hf_coverage, check_vocabulary
from bridge.errors import CheckpointError
from bridge.hf_checkpoint import HfCheckpoint
from bridge.hf_rows import read_rows
from bridge.key_forms import as_stored
from bridge.live_vocabulary import check_same_vocabulary, num_rows
from bridge.mapped_files import MappedFiles, StoredItems, copy_elements
from bridge.mapping import Block, WeightPlan
from bridge.megatron_checkpoint import Vocabulary
from bridge.quantization import QuantizedTensor
from bridge.shards import Box, Shard, blocks_by_tensor, check_model_coverage, overlap, part_of, rows_of_block
from bridge.torch_dist.metadata import METADATA, Chunk, TorchDistMetadata
from bridge.vocab_padding import EMBEDDING, PADDED_KEYS

DEQUANTIZED_ELEMENTS = 16 << 20  # at a time, of which there are a few copies


class WeightSource(Protocol):
    """Weights of one model by Megatron's global tensors."""

    def check(self, boxes: set[Box], noted: int | None) -> None:
        """Raise an InputError unless the model that has `boxes` on its ranks has exactly these tensors.

        `noted` is its vocabulary, where that is known.
        """

    def fill(self, shard: Shard) -> None:
        """Copy the shard's part of its global tensor into it, cast to its dtype.

        Rows that only pad the vocabulary become zero; anything else that is missing is a CheckpointError.
        """


class HfSource:
    """The tensors of a Hugging Face folder, in the rows that Megatron has them."""

    def __init__(self, plan: WeightPlan, checkpoint: HfCheckpoint, files: OpenFiles) -> None:
        check_hf_coverage(plan, checkpoint)
        self._plan = plan
        self._checkpoint = checkpoint
        self._blocks = blocks_by_tensor(plan)
        self._files = files
        self._mapped = MappedFiles()

    def check(self, boxes: set[Box], noted: int | None) -> None:
        check_model_coverage(self._blocks, boxes)
        vocab_size = self._plan.megatron_shapes[EMBEDDING][0]
        check_same_vocabulary(noted, num_rows(boxes), vocab_size, str(self._checkpoint.path))

    def fill(self, shard: Shard) -> None:
        box = shard.box
        check_shape(shard, self._plan.megatron_shapes[box.key], self._checkpoint.path)
        if shard.may_be_padded:
            shard.data.zero_()
        for block in self._blocks[box.key, box.lead]:
            first, last = overlap(block, box)
            if first < last:
                target = shard.data[first - box.offsets[0] : last - box.offsets[0]]
                self._copy_rows(target, block, first - block.megatron_row, box.offsets[1:])

    def _copy_rows(self, target: torch.Tensor, block: Block, skip: int, columns: tuple[int, ...]) -> None:
        """Copy a block's rows from `skip` on, with the columns from `columns` on that `target` has."""
        stored = self._checkpoint.tensors[block.hf]
        if isinstance(stored, QuantizedTensor):
            self._copy_dequantized(target, stored, block, skip, columns)
            return
        elements = self._mapped.elements(stored.file, stored.offset, stored.shape, stored.dtype)
        rows = rows_of_block(elements, self._plan, block)
        copy_elements(target, part_of(rows, (skip, *columns), target.shape), stored.dtype)

    def _copy_dequantized(
        self,
        target: torch.Tensor,
        stored: QuantizedTensor,
        block: Block,
        skip: int,
        columns: tuple[int, ...],
    ) -> None:
        """Do the same for a quantised tensor, some whole rows at a time."""
        shape, transposed = self._plan.columns(block.key, block.lead), block.hf in self._plan.transposed
        width, step = math.prod(shape), block.hf_step
        limit = max(1, DEQUANTIZED_ELEMENTS // width)
        for row in range(0, target.shape[0], limit):
            part = target[row : row + limit]
            first = block.hf_row + (skip + row) * step
            rows = read_rows(
                stored, self._files, first, len(part), columns=width, step=step, transposed=transposed
            ).view(len(part), *shape)
            part.copy_(part_of(rows, (0, *columns), part.shape))


class MegatronSource:
    """The model's tensors of a `torch_dist` checkpoint, whatever chunks and names they are stored in."""

    def __init__(
        self, folder: Path, metadata: TorchDistMetadata, vocabulary: Vocabulary, files: OpenFiles
    ) -> None:
        self._folder = folder
        self._vocabulary = vocabulary
        self._tensors = metadata.tensors
        self._items = StoredItems(files, MappedFiles())
        self._chunks: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}
        self._paths: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._blocks: dict[str, list[Block]] = {}

    def check(self, boxes: set[Box], noted: int | None) -> None:
        plan = as_stored(plan_of_model(boxes), self._tensors)
        self._shapes, self._blocks = plan.megatron_shapes, defaultdict(list)
        for block in plan.blocks:
            self._blocks[block.hf].append(block)
        if missing := sorted(self._shapes.keys() - self._tensors.keys()):
            raise CheckpointError(f"{self._folder} has no {missing[0]!r}, which the model needs")
        if extra := sorted(self._tensors.keys() - self._shapes.keys()):
            raise CheckpointError(f"{self._folder} has {extra[0]!r}, which the model has no place for")
        self.check_vocabulary(num_rows(boxes), noted)

    def check_vocabulary(self, rows: int, noted: int | None) -> None:
        """Raise CoverageError unless the embedding of a model, with `rows`, is for the stored vocabulary.

        Where neither the folder nor the model says which that is, all rows are taken for tokens.
        """
        vocab_size = self._vocabulary.size or noted or rows
        check_same_vocabulary(noted, rows, vocab_size, str(self._folder))
        for key in sorted(self._tensors.keys() & set(PADDED_KEYS)):
            stored = self._tensors[key].shape[0]
            check_vocabulary(key, stored, vocab_size, self._vocabulary.padding, str(self._folder))

    def fill(self, shard: Shard) -> None:
        for block in self._blocks[name_of(shard.box)]:
            if part := as_block_has(shard, block, self._shapes[block.key]):
                self._fill(part)

    def _fill(self, shard: Shard) -> None:
        box, stored = shard.box, self._tensors[shard.box.key]
        check_shape(shard, stored.shape, self._folder)
        if shard.may_be_padded:
            shard.data.zero_()
        begin, size = (*box.lead, *box.offsets), (*(1 for _ in box.lead), *box.sizes)
        target = shard.data[(None,) * len(box.lead)]
        found = 0
        for chunk in self._chunks_at(box.key, box.lead):
            first, count = common_box(begin, size, chunk)
            if all(count):
                there = [number - start for number, start in zip(first, begin, strict=True)]
                self._copy(chunk, box.key, first, part_of(target, there, count))
                found += math.prod(count)
        inside = [min(a + n, whole) - a for a, n, whole in zip(begin, size, stored.shape, strict=True)]
        if found != math.prod(max(0, number) for number in inside):
            raise CheckpointError(
                f"{self._folder}: the chunks of {box.key!r} overlap or leave a gap at {begin}"
            )

    def _copy(self, chunk: Chunk, key: str, first: list[int], target: torch.Tensor) -> None:
        name, start, length = chunk.place
        if name not in self._paths:
            self._paths[name] = contained_file(self._folder, name, self._folder / METADATA)
        elements, dtype = self._items.elements(self._paths[name], start, length, chunk.sizes, key)
        here = [number - offset for number, offset in zip(first, chunk.offsets, strict=True)]
        copy_elements(target, part_of(elements, here, target.shape), dtype)

    def _chunks_at(self, key: str, lead: tuple[int, ...]) -> list[Chunk]:
        if key not in self._chunks:
            self._chunks[key] = chunks_by_lead(self._tensors[key].chunks, len(lead))
        return self._chunks[key].get(lead, [])


def name_of(box: Box) -> str:
    """Name the global tensor that a box is of; `plan_of_model` has it in the place of a Hugging Face name."""
    return f"{box.key} {list(box.lead)}"


def plan_of_model(boxes: Iterable[Box]) -> WeightPlan:
    """Return the plan by which each global tensor of a model, known from all ranks' boxes, is its own."""
    plan = WeightPlan()
    tensors: dict[str, Box] = {}
    for box in boxes:
        ends = (*(number + 1 for number in box.lead), *map(sum, zip(box.offsets, box.sizes, strict=True)))
        known = plan.megatron_shapes.get(box.key, ends)
        plan.megatron_shapes[box.key] = tuple(map(max, known, ends))
        tensors[name_of(box)] = box
    for name, box in tensors.items():
        rows = plan.megatron_shapes[box.key][len(box.lead)]
        plan.blocks.append(Block(name, 0, rows, box.key, box.lead, 0))
    return plan


def as_block_has(shard: Shard, block: Block, shape: tuple[int, ...]) -> Shard | None:
    """Return a shard's rows in `block` as a shard of the tensor that the block lies in, of that `shape`."""
    box = shard.box
    first = max(block.hf_row, box.offsets[0])
    rows = min(block.hf_row + block.rows, box.offsets[0] + box.sizes[0]) - first
    if rows <= 0:
        return None
    offsets = (block.megatron_row + first - block.hf_row, *box.offsets[1:])
    part = Box(block.key, block.lead, offsets, (rows, *box.sizes[1:]), box.dtype)
    data = shard.data.narrow(0, first - box.offsets[0], rows)
    return Shard(part, data, shape, shard.may_be_padded)


def check_shape(shard: Shard, stored: tuple[int, ...], where: Path) -> None:
    """Raise CheckpointError unless a stored global tensor has the model's shape, vocabulary padding aside."""
    found, wanted, row = list(stored), list(shard.global_shape), len(shard.box.lead)
    if shard.may_be_padded and len(found) == len(wanted):
        found[row] = wanted[row]
    if found != wanted:
        raise CheckpointError(
            f"{where} has {shard.box.key!r} of shape {list(stored)}, the model wants {wanted}"
        )


def chunks_by_lead(chunks: list[Chunk], num_leads: int) -> dict[tuple[int, ...], list[Chunk]]:
    """Sort chunks by the leads that they hold rows of; most hold one."""
    found: dict[tuple[int, ...], list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        boxes = list(zip(chunk.offsets, chunk.sizes, strict=True))[:num_leads]
        for lead in itertools.product(*(range(offset, offset + size) for offset, size in boxes)):
            found[lead].append(chunk)
    return found


def common_box(begin: tuple[int, ...], size: tuple[int, ...], chunk: Chunk) -> tuple[list[int], list[int]]:
    """Return offsets and sizes of what a box and a chunk have in common; a size of 0 says nothing."""
    first = [max(pair) for pair in zip(begin, chunk.offsets, strict=True)]
    ends = [(a + n, b + m) for a, n, b, m in zip(begin, size, chunk.offsets, chunk.sizes, strict=True)]
    return first, [max(0, min(pair) - start) for pair, start in zip(ends, first, strict=True)]
