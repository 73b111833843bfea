"""Weights between a live, sharded model and a Hugging Face checkpoint, by the plan of conversions on disk.

Nothing here knows about tensor or pipeline parallelism: each rank's `ShardedTensor`s say which box of which
global tensor it holds.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.utils import unwrap_model
from safetensors import safe_open

from bridge.coverage import check_hf_coverage
from bridge.distributed import device
from bridge.errors import CoverageError
from bridge.families import plan_weights
from bridge.hf_checkpoint import HfCheckpoint
from bridge.mapping import Block, WeightPlan
from bridge.provider import GPTModelProvider

GlobalTensor = tuple[str, tuple[int, ...]]
"""A key of the weight plan and the index into its leading axes."""


class Box(NamedTuple):
    """The part of a global tensor that a rank holds: offsets and sizes without the leading axes."""

    key: str
    lead: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Shard:
    """A box and this rank's tensor for it, a view of a parameter."""

    box: Box
    data: torch.Tensor
    is_main_replica: bool


def shards_of(chunks: Sequence[torch.nn.Module]) -> list[Shard]:
    """List the shards of this rank's model chunks, each parameter's rows where the global tensor has them."""
    shards: list[Shard] = []
    for chunk in unwrap_model(list(chunks)):
        state_dict = chunk.sharded_state_dict()
        apply_factories(state_dict)  # splits gate from up projections, which lie apart in the global tensor
        tensors = [value for value in nested_values(state_dict) if isinstance(value, ShardedTensor)]
        shards.extend(_shard(tensor) for tensor in tensors)
    return shards


def _shard(tensor: ShardedTensor) -> Shard:
    axes = tensor.prepend_axis_num
    offset = tuple(int(number) for number in tensor.global_offset)
    box = Box(tensor.key, offset[:axes], offset[axes:], tuple(tensor.local_shape), tensor.dtype)
    return Shard(box, tensor.data.detach(), is_main_replica(tensor.replica_id))


def blocks_by_tensor(plan: WeightPlan) -> dict[GlobalTensor, list[Block]]:
    blocks: dict[GlobalTensor, list[Block]] = defaultdict(list)
    for block in plan.blocks:
        blocks[block.key, block.lead].append(block)
    return blocks


def overlap(block: Block, box: Box) -> tuple[int, int]:
    """Return the rows of the global tensor that are in both; the second not above the first means none."""
    first = max(block.megatron_row, box.offsets[0])
    return first, min(block.megatron_row + block.rows, box.offsets[0] + box.sizes[0])


class HfReader:
    """Reads boxes of tensors from a checkpoint's shards, which stay open and mapped."""

    def __init__(self, checkpoint: HfCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.files: dict[Any, Any] = {}

    def read(self, name: str, first: int, last: int, box: Box) -> torch.Tensor:
        """Return rows [first, last) of tensor `name`, with the columns of `box`."""
        file = self.checkpoint.tensors[name].file
        if file not in self.files:
            self.files[file] = safe_open(file, framework="pt")
        columns = [
            slice(start, start + size) for start, size in zip(box.offsets[1:], box.sizes[1:], strict=True)
        ]
        return self.files[file].get_slice(name)[(slice(first, last), *columns)]


def load_hf_weights(
    chunks: Sequence[torch.nn.Module], provider: GPTModelProvider, checkpoint: HfCheckpoint
) -> None:
    """Fill this rank's model chunks with its own slices of a Hugging Face checkpoint, cast to their dtype."""
    plan = plan_weights(provider)
    check_hf_coverage(plan, checkpoint)
    blocks, reader, shards = blocks_by_tensor(plan), HfReader(checkpoint), shards_of(chunks)
    check_model_coverage(blocks, gather_boxes(shards))
    for shard in shards:
        box = shard.box
        shard.data.zero_()  # rows that only pad the vocabulary
        for block in blocks[box.key, box.lead]:
            first, last = overlap(block, box)
            if first < last:
                row = block.hf_row + first - block.megatron_row
                rows = shard.data[first - box.offsets[0] : last - box.offsets[0]]
                rows.copy_(reader.read(block.hf, row, row + last - first, box))


def export_hf_weights(
    chunks: Sequence[torch.nn.Module], provider: GPTModelProvider, *, cpu: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every Hugging Face tensor whole, in its name, on every rank; all ranks must iterate together.

    One global Megatron tensor at a time is gathered, so memory stays at a layer's largest tensor.
    """
    shards, plan = shards_of(chunks), plan_weights(provider)
    owned = {shard.box: shard.data for shard in shards if shard.is_main_replica}
    blocks, boxes = blocks_by_tensor(plan), gather_boxes(shards)
    check_model_coverage(blocks, boxes)
    for tensor in blocks:
        for name, weight in gather_tensor(blocks[tensor], boxes[tensor], owned, plan).items():
            yield name, weight.cpu() if cpu else weight


def gather_tensor(
    blocks: list[Block], boxes: list[tuple[int, Box]], owned: dict[Box, torch.Tensor], plan: WeightPlan
) -> dict[str, torch.Tensor]:
    """Return the Hugging Face tensors that one global Megatron tensor consists of."""
    names = dict.fromkeys(block.hf for block in blocks)
    dtype = boxes[0][1].dtype
    weights = {name: torch.empty(plan.hf_shapes[name], dtype=dtype, device=device()) for name in names}
    for rank, box in boxes:
        part = owned.get(box) if rank == torch.distributed.get_rank() else None
        scatter_rows(blocks, box, broadcast(part, box, rank), weights)
    return weights


def check_model_coverage(
    blocks: dict[GlobalTensor, list[Block]], boxes: dict[GlobalTensor, list[tuple[int, Box]]]
) -> None:
    """Raise CoverageError unless all ranks together hold exactly the tensors of the plan."""
    for key, lead in blocks.keys() - boxes.keys():
        raise CoverageError(f"the model has no {key} {list(lead)}, which its family has a rule for")
    for key, lead in boxes.keys() - blocks.keys():
        raise CoverageError(f"the model has {key} {list(lead)}, which its family has no rule for")


def gather_boxes(shards: list[Shard]) -> dict[GlobalTensor, list[tuple[int, Box]]]:
    """Tell every rank which rank holds which box, replicas left out."""
    own = [shard.box for shard in shards if shard.is_main_replica]
    per_rank: list[list[Box]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(per_rank, own)
    boxes: dict[GlobalTensor, list[tuple[int, Box]]] = defaultdict(list)
    for rank, held in enumerate(per_rank):
        for box in held:
            boxes[box.key, box.lead].append((rank, box))
    return boxes


def broadcast(part: torch.Tensor | None, box: Box, rank: int) -> torch.Tensor:
    if part is None:
        part = torch.empty(box.sizes, dtype=box.dtype, device=device())
    part = part.contiguous()
    torch.distributed.broadcast(part, src=rank)
    return part


def scatter_rows(blocks: list[Block], box: Box, part: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the rows of one box to where the Hugging Face tensors have them."""
    for block in blocks:
        first, last = overlap(block, box)
        if first < last:
            row = block.hf_row + first - block.megatron_row
            target = tensors[block.hf][row : row + last - first]
            for axis, (start, size) in enumerate(zip(box.offsets[1:], box.sizes[1:], strict=True), start=1):
                target = target.narrow(axis, start, size)
            target.copy_(part[first - box.offsets[0] : last - box.offsets[0]])
