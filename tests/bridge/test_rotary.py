from typing import Any

import attention_formula
import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from bridge.errors import UnsupportedModelError
from bridge.families import provider_of
from bridge.rotary import attention_factor, inverse_frequencies, set_attention_factor

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 256}


def longrope(head_dim: int, **values: float) -> dict[str, Any]:
    factors = [1 + 0.1 * number for number in range(head_dim // 2)]
    return {**LONGROPE, "short_factor": factors, "long_factor": [2 * factor for factor in factors], **values}


ROPES = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1000000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    {**LLAMA31, "rope_theta": 500000.0},
    {**LLAMA31, "rope_theta": 500000.0, "factor": 32.0},
    {**LLAMA31, "rope_theta": 300000.0, "low_freq_factor": 2.0, "high_freq_factor": 7.0},
    {**LLAMA31, "rope_theta": 500000.0, "original_max_position_embeddings": 512},
    YARN,
    {**YARN, "rope_theta": 150000.0, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    {**YARN, "original_max_position_embeddings": 4096, "attention_factor": 0.8},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    {**YARN, "mscale": 0.7},
    {**YARN, "factor": 1.0},
    LONGROPE,
    {**LONGROPE, "factor": 8.0},
    {**LONGROPE, "attention_factor": 1.2},
    {**LONGROPE, "original_max_position_embeddings": 1024},
]


@pytest.mark.parametrize("length", [0, 64, 2000])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], head_dim: int, length: int) -> None:
    if rope["rope_type"] == "longrope":
        rope = longrope(head_dim, **rope)
    config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(rope), max_position_embeddings=1024)
    expected = LlamaRotaryEmbedding(config)
    if length:
        expected(torch.zeros(1), torch.arange(length)[None])
    provider = provider_of(config.to_dict())
    torch.testing.assert_close(inverse_frequencies(provider, length), expected.inv_freq, rtol=2e-6, atol=0)
    assert attention_factor(provider) == pytest.approx(expected.attention_scaling)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.19])
def test_megatron_scales_by_the_attention_factor(factor: float) -> None:
    config = attention_formula.config()
    set_attention_factor(config, factor)
    assert _yarn_get_concentration_factor_from_config(config) == pytest.approx(factor, abs=1e-15)


def test_part_of_the_channels_turns() -> None:
    config = Phi3Config(
        hidden_size=512, num_attention_heads=8, rope_parameters={"partial_rotary_factor": 0.75}
    )
    frequencies = inverse_frequencies(provider_of(config.to_dict()))
    assert len(frequencies) == 24
    torch.testing.assert_close(frequencies, Phi3RotaryEmbedding(config).inv_freq)


def test_unknown_rope_type_is_refused() -> None:
    provider = provider_of(LlamaConfig().to_dict())
    provider.rope_parameters = {"rope_type": "spiral"}
    with pytest.raises(
        UnsupportedModelError, match="unknown rope type 'spiral': allowed are default, linear"
    ):
        inverse_frequencies(provider)
