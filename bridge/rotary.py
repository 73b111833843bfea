"""Rotary frequencies by the formulas that transformers uses, with every parameter of a config.

Megatron Core knows llama3 scaling with three of its four numbers written into the code
(models/common/embeddings/rotary_pos_embedding.py), so a model gets its frequencies from here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from bridge.errors import UnsupportedModelError
from bridge.provider import GPTModelProvider


def inverse_frequencies(provider: GPTModelProvider) -> torch.Tensor:
    """Return the angle per position of every pair of channels, as float32 on the CPU."""
    rope_type = provider.rope_parameters["rope_type"]
    if rope_type not in SCALINGS:
        raise UnsupportedModelError(f"unknown rope type {rope_type!r}: allowed are {', '.join(SCALINGS)}")
    size = int(provider.kv_channels * provider.rotary_percent)
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    return SCALINGS[rope_type](1.0 / provider.rotary_base**exponents, provider.rope_parameters)


def unscaled(frequencies: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    return frequencies


def linear(frequencies: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """Stretch all positions by one factor."""
    return frequencies / parameters["factor"]


def llama3(frequencies: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """Stretch long waves by `factor`, keep short ones and blend between (Llama 3.1).

    Waves count as long or short by how often they turn within the original context length.
    """
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / parameters["factor"]


SCALINGS: dict[str, Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]] = {
    "default": unscaled,
    "linear": linear,
    "llama3": llama3,
}
