"""The dtypes of a Megatron checkpoint to be: those of its source, or one for all weights."""

import re
from collections import defaultdict

from bridge.dtypes import FLOAT32_KEYS, common_dtype
from bridge.errors import CoverageError
from bridge.mapping import WeightPlan
from bridge.quantization import HfTensor, stored_slices

NUMBER = re.compile(r"\.\d+\.")  # of a layer or an expert

NamesByDtype = dict[str, list[str]]


def stored_dtypes(plan: WeightPlan, tensors: dict[str, HfTensor], wanted: str | None) -> dict[str, str]:
    """Return the dtype of every Megatron key: `wanted`, or the one that holds all of its parts exactly.

    A key has one dtype for all that it is made of, often for every layer and expert. Kinds of tensors may
    differ, as routers and norms in float32 do in released models. A single tensor that differs from the
    others of its kind in a key is a CoverageError: it would change the dtype of them all, which nobody asked
    for.
    """
    found = _names(plan, tensors)
    if wanted is None:
        for (key, _), names in found.items():
            _check_one_dtype(key, names, tensors)
    dtypes: dict[str, set[str]] = defaultdict(set)
    for (key, _), names in found.items():
        dtypes[key] |= set(names)
    kept = {key for key in dtypes if wanted is None or key.endswith(FLOAT32_KEYS)}
    return {key: common_dtype(parts) if key in kept else str(wanted) for key, parts in dtypes.items()}


def _names(plan: WeightPlan, tensors: dict[str, HfTensor]) -> dict[tuple[str, str], NamesByDtype]:
    """Return the names of each kind of tensors in each key by their dtype, once for every block."""
    found: dict[tuple[str, str], NamesByDtype] = defaultdict(lambda: defaultdict(list))
    for block in plan.blocks:
        kind = NUMBER.sub(".*.", block.hf)
        found[block.key, kind][tensors[block.hf].dtype].append(block.hf)
    return found


def _check_one_dtype(key: str, names: NamesByDtype, tensors: dict[str, HfTensor]) -> None:
    usual, *others = sorted(names, key=lambda dtype: -len(names[dtype]))
    for odd in others:
        name = names[odd][0]
        raise CoverageError(
            f"{stored_slices(tensors[name])[0].file}: {name!r} is {odd}, others of its kind are {usual}, but"
            f" Megatron's {key!r} has one dtype: choose one for all weights (--dtype)"
        )
