"""What a rank saves of the distributed optimizer: its own part of every master weight and moment.

Megatron Core's `fully_reshardable` state (megatron/core/optimizer/distrib_optimizer.py) gathers all of it on
every data-parallel rank, in fp32 and in host memory, before it is saved: most of the time that a checkpoint
takes, and 12 bytes for every parameter of the rank's model. Here every rank describes its part in place. That
is a stretch of the flattened parameter, so a few boxes of the tensor that the checkpoint has. Keys and shapes
are Megatron's, and it loads them.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

SHARDING = "fully_reshardable"
PREFIX = "optimizer.state"
Box = tuple[tuple[int, ...], tuple[int, ...]]


def local_state(optimizer: ChainedOptimizer, weights: dict[str, Any]) -> dict[Any, Any]:
    """Return this rank's part of the state of a chain, of one or more; `weights` is the model's.

    The tensors are those of the optimizer, not copies, unless it keeps fewer bits than a checkpoint.
    """
    parameters = sharded_by_parameter(weights)
    chained = optimizer.chained_optimizers
    if len(chained) == 1:
        return state_of_one(chained[0], parameters)
    optimizer._synchronize_steps()
    return {number: state_of_one(each, parameters) for number, each in enumerate(chained)}


def sharded_by_parameter(weights: dict[str, Any]) -> dict[Any, Any]:
    sharded = extract_sharded_tensors_and_factories(weights)[0]
    return {each.data: each for each in nested_values(sharded)}


def state_of_one(optimizer: DistributedOptimizer, parameters: dict[Any, Any]) -> dict[str, Any]:
    tensors = {
        name: list(parts_of(optimizer, parameter, begin, parameters[parameter]))
        for name, parameter, begin in stretches(optimizer)
    }
    state = optimizer.state_dict()
    return {
        **state,
        "optimizer": {**state["optimizer"], "param_groups": settings_of(state["optimizer"]["param_groups"])},
        "param_state": tensors,
        "param_state_sharding_type": SHARDING,
    }


def settings_of(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the classes that an optimizer on the host has among its settings: no data, and not loaded."""
    return [{name: value for name, value in group.items() if not isinstance(value, type)} for group in groups]


def stretches(optimizer: DistributedOptimizer) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield a number, the parameter, and where in it this rank's stretch begins."""
    buckets = [
        bucket for ranges in optimizer.gbuf_ranges for buckets in ranges.values() for bucket in buckets
    ]
    for number, bucket in enumerate(buckets):
        for position, (parameter, found) in enumerate(bucket["param_map"].items()):
            yield f"{number}.{position}", parameter, found["param"].start


def parts_of(
    optimizer: DistributedOptimizer, parameter: torch.Tensor, begin: int, sharded: Any
) -> Iterator[ShardedTensor]:
    states = optimizer._get_main_param_and_optimizer_states(parameter)
    pieces = list(global_pieces(sharded, parameter.shape))
    for name, state in states.items():
        if name == "step":  # of the whole group, and saved there
            continue
        # a state of fewer bits has just been turned into fp32 in the GPU's memory
        here = state.cpu() if optimizer.config.use_precision_aware_optimizer else state
        for piece, first in pieces:
            yield from boxes_of(piece, first, f"{PREFIX}.{name}.{sharded.key}", here, begin)


def global_pieces(sharded: Any, shape: torch.Size) -> Iterator[tuple[ShardedTensor, int]]:
    """Yield the tensors that a parameter is saved as, and where in the flattened parameter each begins.

    A gated layer's weight is two. Its factory is asked with a tensor that has no memory.
    """
    if isinstance(sharded, ShardedTensor):
        yield sharded, 0
        return
    assert isinstance(sharded, ShardedTensorFactory)
    nothing = torch.empty(shape, device="meta")
    for piece in nested_values(sharded.build_fn(sharded.key, nothing, sharded.replica_id, None)):
        assert piece.data.is_contiguous(), f"{sharded.key} is not saved as stretches of the parameter"
        yield piece, piece.data.storage_offset()


def boxes_of(
    piece: ShardedTensor, first: int, key: str, state: torch.Tensor, begin: int
) -> Iterator[ShardedTensor]:
    """Yield the boxes of what the stretch `state`, from `begin` on, has of the piece beginning at `first`."""
    low = max(begin, first) - first
    high = min(begin + state.numel(), first + math.prod(piece.local_shape)) - first
    flat = state.detach().float().flatten()  # fp32 already, unless the optimizer keeps fewer bits
    for offset, size in boxes(tuple(piece.local_shape), low, high):
        position = first + low - begin
        low += math.prod(size)
        yield box_of(piece, offset, flat[position : position + math.prod(size)], size, key)


def box_of(
    piece: ShardedTensor, offset: tuple[int, ...], data: torch.Tensor, size: tuple[int, ...], key: str
) -> ShardedTensor:
    # only tensors on no regular grid may have boxes of any size, and those have all axes of the whole
    leading = piece.prepend_axis_num
    whole = (1,) * leading + size
    moved = zip(piece.global_offset, (0,) * leading + offset, strict=True)
    pipeline, tensor = piece.replica_id[:2]
    return replace(
        piece,
        key=key,
        data=data.view(whole),
        dtype=data.dtype,
        local_shape=whole,
        global_offset=tuple(base + inner for base, inner in moved),
        axis_fragmentations=None,
        prepend_axis_num=0,
        # data-parallel ranks have parts that differ
        replica_id=(pipeline, tensor, 0),
    )


def boxes(shape: tuple[int, ...], low: int, high: int) -> Iterator[Box]:
    """Cut the elements [low, high) of a flattened tensor into boxes, offset and size, in their order."""
    if low >= high:
        return
    if len(shape) == 1:
        yield (low,), (high - low,)
        return
    row = math.prod(shape[1:])
    if low % row or high - low < row:  # up to the end of a row that is not whole
        number, end = low // row, min(high, (low // row + 1) * row)
        for offset, size in boxes(shape[1:], low - number * row, end - number * row):
            yield (number, *offset), (1, *size)
        yield from boxes(shape, end, high)
        return
    rows = (high - low) // row
    yield (low // row, *(0 for _ in shape[1:])), (rows, *shape[1:])
    yield from boxes(shape, low + rows * row, high)
