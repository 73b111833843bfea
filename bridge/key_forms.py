"""The forms of a Megatron tensor's name: layers and experts are axes, or numbers in the key.

Which one a checkpoint has depends on the settings of who saved it, not on the model: `non_homogeneous_layers`
puts the layer's number into the key, `singleton_local_shards` the expert's too, and gives gate and up
projection a key each (megatron/core/transformer: transformer_block.py, moe/experts.py, mlp.py).
"""

import dataclasses
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from bridge.mapping import Block, Shape, WeightPlan

LAYERS = "decoder.layers."
EXPERTS = "mlp.experts.experts."
GATE, UP = "_w", "_v"


class _Form(NamedTuple):
    """One tensor by another name; `lead` and `shape` as that name has them."""

    key: str
    lead: tuple[int, ...]
    shape: Shape


def as_stored(plan: WeightPlan, stored: Collection[str]) -> WeightPlan:
    """Return the plan by the names that a checkpoint has; a name that it has in no form stays."""
    if all(key in stored for key in plan.megatron_shapes):
        return plan
    blocks: list[Block] = []
    shapes: dict[str, Shape] = {}
    for block in plan.blocks:
        for part, shape in _stored_parts(block, plan, stored):
            blocks.append(part)
            shapes[part.key] = shape
    return dataclasses.replace(plan, blocks=blocks, megatron_shapes=shapes)


def _stored_parts(block: Block, plan: WeightPlan, stored: Collection[str]) -> Iterator[tuple[Block, Shape]]:
    forms = list(_forms(block, plan.megatron_shapes[block.key], _num_layers(plan)))
    for form in forms:
        if form.key in stored:
            yield block._replace(key=form.key, lead=form.lead), form.shape
            return
        if form.key + GATE in stored:
            yield from _halves(block, form)
            return
    yield block, plan.megatron_shapes[block.key]


def _num_layers(plan: WeightPlan) -> int:
    numbers = [int(found[1]) for key in plan.megatron_shapes if (found := re.match(rf"{LAYERS}(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _forms(block: Block, shape: Shape, num_layers: int) -> Iterator[_Form]:
    form = _Form(block.key, block.lead, shape)
    yield form
    rest = block.key.removeprefix(LAYERS)
    number, _, name = rest.partition(".")
    if rest != block.key and number.isdigit():
        yield _Form(LAYERS + name, (int(number), *form.lead), (num_layers, *shape))
    elif rest != block.key:
        form = _Form(f"{LAYERS}{form.lead[0]}.{rest}", form.lead[1:], shape[1:])
        yield form
    if EXPERTS in form.key and form.lead:
        yield _Form(form.key.replace(EXPERTS, f"{EXPERTS}{form.lead[0]}."), (), form.shape[1:])


def _halves(block: Block, form: _Form) -> Iterator[tuple[Block, Shape]]:
    """Yield the parts of a block in the upper and the lower half of a tensor that is stored as two."""
    axis = len(form.lead)
    half = form.shape[axis] // 2
    shape = (*form.shape[:axis], half, *form.shape[axis + 1 :])
    for ending, first in ((GATE, 0), (UP, half)):
        begin = max(block.megatron_row, first)
        end = min(block.megatron_row + block.rows, first + half)
        if begin < end:
            skip = begin - block.megatron_row
            part = block._replace(hf_row=block.hf_row + skip * block.hf_step, rows=end - begin)
            yield part._replace(key=form.key + ending, lead=form.lead, megatron_row=begin - first), shape
