"""Rotary embedding by the formulas that transformers uses, with every parameter of a config.

Megatron Core knows llama3 scaling with three of its four numbers written into the code and no longrope
(models/common/embeddings/rotary_pos_embedding.py), so a model gets its frequencies from here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig

from bridge.errors import UnsupportedModelError
from bridge.provider import GPTModelProvider

Parameters = dict[str, Any]
LENGTH_DEPENDENT = ("dynamic", "longrope")


def inverse_frequencies(provider: GPTModelProvider, length: int = 0) -> torch.Tensor:
    """Return the angle per position of every pair of channels, as float32 on the CPU.

    `length` is the number of tokens of the sequence at hand, by which dynamic and longrope scaling choose;
    by default one of the length that the model was first trained for.
    """
    parameters = {
        **provider.rope_parameters,
        "max_position_embeddings": provider.max_position_embeddings,
        "rope_theta": provider.rotary_base,
    }
    return scaled_frequencies(parameters, rotary_size(provider), length)


def local_inverse_frequencies(provider: GPTModelProvider) -> torch.Tensor:
    """Return the same for the layers with a sliding window, where theirs differ."""
    assert provider.rope_local_parameters is not None
    return scaled_frequencies(provider.rope_local_parameters, rotary_size(provider))


def rotary_size(provider: GPTModelProvider) -> int:
    """Return the number of channels of a head that turn with the position."""
    if provider.multi_latent_attention:
        return provider.qk_pos_emb_head_dim
    return int(provider.kv_channels * provider.rotary_percent)


def scaled_frequencies(parameters: Parameters, size: int, length: int = 0) -> torch.Tensor:
    """Compute the frequencies of `size` channels from rope parameters in transformers' normal form."""
    rope_type = parameters["rope_type"]
    if rope_type not in SCALINGS:
        raise UnsupportedModelError(f"unknown rope type {rope_type!r}: allowed are {', '.join(SCALINGS)}")
    return SCALINGS[rope_type](parameters, size, length)


def unscaled(parameters: Parameters, size: int, length: int = 0) -> torch.Tensor:
    return 1.0 / wavelengths(parameters["rope_theta"], size)


def wavelengths(theta: float, size: int) -> torch.Tensor:
    """Return the positions per radian of each pair of channels."""
    return theta ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)


def linear(parameters: Parameters, size: int, length: int = 0) -> torch.Tensor:
    """Stretch all positions by one factor."""
    return unscaled(parameters, size) / parameters["factor"]


def dynamic(parameters: Parameters, size: int, length: int = 0) -> torch.Tensor:
    """Leave sequences up to max_position_embeddings alone; stretch waves with the length of longer ones."""
    factor, longest = parameters["factor"], parameters["max_position_embeddings"]
    stretch = factor * max(length, longest) / longest - (factor - 1)
    return 1.0 / wavelengths(parameters["rope_theta"] * stretch ** (size / (size - 2)), size)


def llama3(parameters: Parameters, size: int, length: int = 0) -> torch.Tensor:
    """Stretch long waves by `factor`, keep short ones and blend between (Llama 3.1).

    Waves count as long or short by how often they turn within the original context length.
    """
    frequencies = unscaled(parameters, size)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / parameters["factor"]


def yarn(parameters: Parameters, size: int, length: int = 0) -> torch.Tensor:
    """Stretch waves that turn less than `beta_slow` times in the original context, keep short ones and blend.

    Those that turn more than `beta_fast` times are short (YaRN, arXiv 2309.00071, section 3.2).
    """
    theta, original = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    first, last = (
        size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1)
    )
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    # transformers' way out of a division by zero
    width = last - first or 0.001
    stretched = ((torch.arange(size // 2, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)
    frequencies = unscaled(parameters, size)
    return stretched * frequencies / parameters["factor"] + (1 - stretched) * frequencies


def longrope(parameters: Parameters, size: int, length: int = 0) -> torch.Tensor:
    """Stretch each wave by a factor of its own, by another one in sequences beyond the original length."""
    beyond = length > parameters["original_max_position_embeddings"]
    factors = torch.tensor(
        parameters["long_factor" if beyond else "short_factor"], dtype=torch.float32, device="cpu"
    )
    return 1.0 / (factors * wavelengths(parameters["rope_theta"], size))


SCALINGS: dict[str, Callable[[Parameters, int, int], torch.Tensor]] = {
    "default": unscaled,
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}


def attention_factor(provider: GPTModelProvider) -> float:
    """Return the factor that yarn and longrope put on the cosines and sines of queries and keys."""
    parameters = provider.rope_parameters
    if parameters["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if (given := parameters.get("attention_factor")) is not None:
        return float(given)
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or provider.max_position_embeddings / original
    if factor <= 1:
        return 1.0
    if parameters["rope_type"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if scale and scale_all:
        return (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def set_attention_factor(config: TransformerConfig, factor: float) -> None:
    """Make Megatron's attention multiply cosines and sines by `factor`, of all or of part of the channels.

    It computes the factor from three attributes that no config class declares
    (models/common/embeddings/yarn_rotary_pos_embedding.py, _yarn_get_concentration_factor_from_config) as
    (0.1 mscale log(scale) + 1) / (0.1 mscale_all_dim log(scale) + 1).
    """
    if factor != 1:
        config.yarn_rotary_scaling_factor = math.e
        config.yarn_mscale, config.yarn_mscale_all_dim = 10 * (factor - 1), 0.0


class DecoderRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding with a provider's frequencies.

    If the layers with a sliding window have frequencies of their own, the result has them behind the others
    on axis 1: [sequence, 2, 1, channels].
    """

    def __init__(self, provider: GPTModelProvider, device: torch.device) -> None:
        super().__init__(provider.kv_channels, provider.rotary_percent, provider.rotary_interleaved)
        self.provider, self.device = provider, device
        self.inv_freq = inverse_frequencies(provider).to(device)
        self.local: RotaryEmbedding | None = None
        if provider.rope_local_parameters is not None:
            self.local = RotaryEmbedding(
                provider.kv_channels, provider.rotary_percent, provider.rotary_interleaved
            )
            self.local.inv_freq = local_inverse_frequencies(provider).to(device)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Return the angles of the positions of a sequence of `max_seq_len` tokens."""
        if self.provider.rope_parameters["rope_type"] in LENGTH_DEPENDENT:
            self.inv_freq = inverse_frequencies(self.provider, max_seq_len).to(self.device)
        angles = super().get_emb(max_seq_len, offset)
        if self.local is None:
            return angles
        return torch.cat([angles, self.local.get_emb(max_seq_len, offset)], dim=1)
