"""What the ranks of a live model hold: boxes of global tensors, as `ShardedTensor`s describe them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model

from bridge.errors import CoverageError
from bridge.mapping import Block, WeightPlan

GlobalTensor = tuple[str, tuple[int, ...]]
"""A key of the weight plan and the index into its leading axes."""


class Box(NamedTuple):
    """The part of a global tensor that a rank holds: offsets and sizes without the leading axes."""

    key: str
    lead: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype


class Shard(NamedTuple):
    """A box, this rank's tensor for it (a view of a parameter) and the shape of the global tensor."""

    box: Box
    data: torch.Tensor
    global_shape: tuple[int, ...]
    """Leading axes included."""
    may_be_padded: bool
    """Say whether the global tensor may have more rows than a checkpoint: the vocabulary."""


def shards_of(chunks: Sequence[torch.nn.Module]) -> list[Shard]:
    """List the shards of this rank's model chunks, each parameter's rows where the global tensor has them."""
    shards: list[Shard] = []
    for chunk in unwrap_model(list(chunks)):
        state_dict = chunk.sharded_state_dict()
        apply_factories(state_dict)  # splits gate from up projections, which lie apart in the global tensor
        storages = {tensor.untyped_storage().data_ptr() for tensor in _tensors_of(chunk)}
        for value in nested_values(state_dict):
            if isinstance(value, ShardedTensor):
                if value.data.untyped_storage().data_ptr() not in storages:
                    raise CoverageError(
                        f"the model describes a copy of {value.key!r}, such as of an FP8 weight: it can be"
                        " neither filled nor read in place"
                    )
                shards.append(_shard(value))
    return shards


def _tensors_of(chunk: torch.nn.Module) -> Iterable[torch.Tensor]:
    yield from chunk.parameters()
    yield from chunk.buffers()


def _shard(tensor: ShardedTensor) -> Shard:
    axes = tensor.prepend_axis_num
    offset = tuple(int(number) for number in tensor.global_offset)
    box = Box(tensor.key, offset[:axes], offset[axes:], tuple(tensor.local_shape), tensor.dtype)
    return Shard(box, tensor.data.detach(), tuple(tensor.global_shape), tensor.allow_shape_mismatch)


def gather_boxes(shards: Iterable[Shard]) -> list[set[Box]]:
    """Tell every rank which boxes each rank holds, replicas included."""
    boxes: list[set[Box]] = [set() for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(boxes, {shard.box for shard in shards})
    return boxes


def blocks_by_tensor(plan: WeightPlan) -> dict[GlobalTensor, list[Block]]:
    blocks: dict[GlobalTensor, list[Block]] = defaultdict(list)
    for block in plan.blocks:
        blocks[block.key, block.lead].append(block)
    return blocks


def check_model_coverage(tensors: Iterable[GlobalTensor], boxes: Iterable[Box]) -> None:
    """Raise CoverageError unless the boxes of all ranks are of exactly the plan's tensors."""
    wanted, held = set(tensors), {(box.key, box.lead) for box in boxes}
    for key, lead in sorted(wanted - held):
        raise CoverageError(f"the model has no {key} {list(lead)}, which its family has a rule for")
    for key, lead in sorted(held - wanted):
        raise CoverageError(f"the model has {key} {list(lead)}, which its family has no rule for")


def overlap(block: Block, box: Box) -> tuple[int, int]:
    """Return the rows of the global tensor that are in both; the second not above the first means none."""
    first = max(block.megatron_row, box.offsets[0])
    return first, min(block.megatron_row + block.rows, box.offsets[0] + box.sizes[0])


def part_of(tensor: torch.Tensor, offsets: Iterable[int], sizes: Iterable[int]) -> torch.Tensor:
    """Return the part that begins at `offsets` and has `sizes`; axes beyond those stay as they are."""
    for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(axis, offset, size)
    return tensor


def rows_of_block(tensor: torch.Tensor, plan: WeightPlan, block: Block) -> torch.Tensor:
    """Return the rows of `block` in its Hugging Face tensor, a view of shape [rows, *columns].

    `tensor` has the shape that the file has; axes beyond those stay as they are.
    """
    axes = len(plan.hf_shapes[block.hf])
    row, count = block.hf_row, (block.rows - 1) * block.hf_step + 1
    if block.hf in plan.transposed:
        if axes > 2:  # a matrix for each expert; a block's rows are of one
            matrix, row = divmod(row, tensor.shape[axes - 1])
            tensor = tensor.flatten(0, axes - 3)[matrix]
        tensor = tensor.transpose(0, 1)
    else:
        tensor = tensor.view(-1, *plan.columns(block.key, block.lead), *tensor.shape[axes:])
    return tensor[row : row + count : block.hf_step]
