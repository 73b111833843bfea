"""What FP8 with delayed scaling goes on from: each module's recent extremes and the factors made of them.

Transformer Engine offers them as a pickle (`_extra_state`), which no checkpoint of ours holds; these are
plain tensors. The other FP8 recipes compute their factors anew from every tensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.utils import unwrap_model

from training.random_state import sharded_by_rank

KEY = "fp8_state"
DIRECTIONS = ("scaling_fwd", "scaling_bwd")
Scaling = dict[str, dict[str, torch.Tensor]]


def sharded_fp8_state(chunks: list[Any]) -> ShardedObject:
    """Return the scaling of this pipeline and tensor rank's modules, which its data-parallel ranks share."""
    return sharded_by_rank(
        KEY, {name: scaling(module) for name, module in fp8_modules(chunks) if started(module)}
    )


def load_fp8_state(chunks: list[Any], state: dict[str, Scaling]) -> None:
    """Give the modules the scaling that they had."""
    for name, module in fp8_modules(chunks):
        if name in state:
            start(module, state[name], get_fp8_recipe(unwrap_model(chunks[0]).config))
            for direction, tensors in state[name].items():
                for kind, tensor in tensors.items():
                    getattr(module.fp8_meta[direction], kind).copy_(tensor)


@contextmanager
def unchanged(chunks: list[Any]) -> Iterator[None]:
    """Take back what passes without gradients do to the scaling.

    Transformer Engine notes their extremes, which would count as those of the next training pass.
    """
    before = {name: module.get_fp8_meta_tensors() for name, module in fp8_modules(chunks) if started(module)}
    yield
    for name, module in fp8_modules(chunks):
        if started(module):
            module.reset_fp8_meta_tensors(before.get(name))  # without any, to those of a new module


def fp8_modules(chunks: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the modules of Transformer Engine that scale, with the number of their chunk in their name."""
    for number, chunk in enumerate(unwrap_model(chunks)):
        for name, module in chunk.named_modules():
            if hasattr(module, "fp8_meta") and hasattr(module, "init_fp8_meta_tensors"):
                yield f"{number}.{name}", module


def started(module: Any) -> bool:
    """Say whether a module has computed in FP8, before which it has nothing to save."""
    return all(hasattr(module.fp8_meta.get(direction), "amax_history") for direction in DIRECTIONS)


def start(module: Any, saved: Scaling, recipe: Any) -> None:
    """Make a module's tensors before its first pass does: three for each of its matrix products forward."""
    module.fp8_meta["num_gemms"] = saved["scaling_fwd"]["scale"].numel() // 3
    module.fp8_meta["recipe"] = recipe
    module.init_fp8_meta_tensors(recipe)


def scaling(module: Any) -> Scaling:
    return {
        direction: {
            kind: getattr(module.fp8_meta[direction], kind).detach().cpu()
            for kind in ("scale", "amax_history")
        }
        for direction in DIRECTIONS
    }
