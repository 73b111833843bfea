"""Quantised weights: packed values with scales beside them are seen as the one tensor that they stand for.

Two kinds are read, by `quantization_config.quant_method` of config.json. "fp8": `X` in float8_e4m3fn with
`X_scale_inv`, one factor for each block of `weight_block_size` or for the whole tensor (DeepSeek-V3, Qwen3).
"mxfp4": `X_blocks` with two 4-bit values a byte and `X_scales`, one power of two for 32 values (gpt-oss).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridge.config_rules import check_types
from bridge.dtypes import ITEM_SIZES, WEIGHT_DTYPES
from bridge.errors import CheckpointError, UnsupportedModelError
from bridge.shard_header import TensorSlice
from bridge.value_types import Count, by_name

CONFIG_KEY = "quantization_config"
# The keys of each method that are understood, and their types. Those about activations and module names have
# no meaning here: which tensors are quantised is seen from the tensors.
METHODS: dict[str, Mapping[str, Any]] = {
    "fp8": by_name(
        activation_scheme=Any,
        dequantize=Any,
        fmt=str,
        ignored_layers=Any,
        modules_to_not_convert=Any,
        scale_fmt=Any,
        weight_block_size=tuple[Count, Count] | None,
    ),
    "mxfp4": by_name(dequantize=Any, modules_to_not_convert=Any),
}
FP8, MXFP4 = METHODS
FP8_SCALE, MXFP4_BLOCKS, MXFP4_SCALES = "_scale_inv", "_blocks", "_scales"
ACTIVATION_SCALE = ".activation_scale"
VALUES_PER_SCALE = 32  # of MXFP4, in 16 bytes


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A tensor of `shape` and `dtype` that is stored as `values` and `scales`.

    FP8 values have the tensor's own axes; each scale is for a block of `block` rows and columns. MXFP4 values
    are the tensor with its last two axes swapped, 32 of them in 16 bytes, the low half of a byte first.
    """

    method: str
    values: TensorSlice
    scales: TensorSlice
    shape: tuple[int, ...]
    dtype: str
    block: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Size of what it stands for, not of what is stored."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


HfTensor = TensorSlice | QuantizedTensor


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Return "fp8", "mxfp4", or None for plain weights; anything else is an UnsupportedModelError."""
    settings = config.get(CONFIG_KEY)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(settings, dict) or method not in list(METHODS):
        raise UnsupportedModelError(
            f"config.json has quantization {method!r}: {' and '.join(METHODS)} can be read;"
            " save the weights anew in bfloat16"
        )
    if unknown := sorted(settings.keys() - METHODS[method].keys() - {"quant_method"}):
        raise UnsupportedModelError(
            f"config.json has {CONFIG_KEY} with key {unknown[0]!r}, which is unknown for {method!r}"
        )
    check_types(settings, METHODS[method], f"{CONFIG_KEY}.")
    if (fmt := settings.get("fmt", "e4m3")) != "e4m3":
        raise UnsupportedModelError(f"config.json has {CONFIG_KEY} with fmt {fmt!r}: 'e4m3' can be read")
    return str(method)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its quantisation, which must be one that can be read."""
    quantization_method(config)
    return {key: value for key, value in config.items() if key != CONFIG_KEY}


def dequantized(config: Mapping[str, Any], tensors: dict[str, TensorSlice]) -> dict[str, HfTensor]:
    """Return the tensors that a checkpoint's `tensors` stand for, those without quantisation as they are."""
    method = quantization_method(config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if method == FP8:
        return _from_fp8(tensors, config[CONFIG_KEY].get("weight_block_size"), dtype)
    return _from_mxfp4(tensors, dtype) if method == MXFP4 else dict(tensors)


def _from_fp8(
    tensors: dict[str, TensorSlice], block_size: list[int] | None, dtype: str
) -> dict[str, HfTensor]:
    found: dict[str, HfTensor] = dict(tensors)
    for name, values in tensors.items():
        if values.dtype.startswith("float8"):
            scales = _sibling(found, name, name + FP8_SCALE)
            found[name] = _fp8_tensor(name, values, scales, block_size, dtype)
            found.pop(name.removesuffix(".weight") + ACTIVATION_SCALE, None)
    return found


def _fp8_tensor(
    name: str, values: TensorSlice, scales: TensorSlice, block_size: list[int] | None, dtype: str
) -> QuantizedTensor:
    if len(values.shape) < 2 or values.dtype != "float8_e4m3fn" or scales.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{values.file}: {name!r} of {values.dtype} {list(values.shape)} with scales of {scales.dtype}"
            " is no block-scaled FP8 weight"
        )
    rows, columns = values.shape[-2:]
    block = (block_size[0], block_size[1]) if block_size else (rows, columns)
    expected = (*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    # A scale of the whole tensor may be stored with fewer axes; where blocks are said it must be all of them.
    whole = math.prod(scales.shape) == 1 and (not block_size or math.prod(expected) == 1)
    if scales.shape != expected and not whole:
        raise CheckpointError(
            f"{scales.file}: {name + FP8_SCALE!r} has shape {list(scales.shape)}; blocks of {list(block)} of"
            f" {list(values.shape)} need {list(expected)}"
        )
    return QuantizedTensor(FP8, values, scales, values.shape, dtype, block)


def _from_mxfp4(tensors: dict[str, TensorSlice], dtype: str) -> dict[str, HfTensor]:
    found: dict[str, HfTensor] = dict(tensors)
    for packed, values in tensors.items():
        name = packed.removesuffix(MXFP4_BLOCKS)
        if name != packed and values.dtype == "uint8":
            del found[packed]
            scales = _sibling(found, name, name + MXFP4_SCALES)
            found[name] = _mxfp4_tensor(name, values, scales, dtype)
    return found


def _mxfp4_tensor(name: str, values: TensorSlice, scales: TensorSlice, dtype: str) -> QuantizedTensor:
    *leading, rows, groups, width = values.shape if len(values.shape) >= 3 else (0, 0, 0)
    if scales.dtype != "uint8" or scales.shape != (*leading, rows, groups) or 2 * width != VALUES_PER_SCALE:
        raise CheckpointError(
            f"{values.file}: {name!r} has blocks {list(values.shape)} and scales {list(scales.shape)} of"
            f" {scales.dtype}: MXFP4 has [..., rows, groups, 16] and [..., rows, groups] of uint8"
        )
    shape = (*leading, groups * VALUES_PER_SCALE, rows)
    return QuantizedTensor(MXFP4, values, scales, shape, dtype, (1, VALUES_PER_SCALE))


def _sibling(found: dict[str, HfTensor], name: str, sibling: str) -> TensorSlice:
    """Take the scales of a tensor out of `found`."""
    scales = found.pop(sibling, None)
    if not isinstance(scales, TensorSlice):
        raise CheckpointError(f"the checkpoint has quantised {name!r} without {sibling!r}: fetch it again")
    return scales


def stored_slices(tensor: HfTensor) -> tuple[TensorSlice, ...]:
    """Return what the files hold of a tensor: itself, or its values and its scales."""
    return (tensor,) if isinstance(tensor, TensorSlice) else (tensor.values, tensor.scales)
