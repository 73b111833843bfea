from collections.abc import Iterator
from typing import Any

import attention_formula
import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.packed_seq_params import PackedSeqParams
from transformers import Gemma3TextConfig, LlamaConfig, NemotronConfig, Phi3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from bridge import distributed
from bridge.config_rules import Rope
from bridge.errors import UnsupportedModelError
from bridge.families import provider_of
from bridge.model_hooks import position_scale, query_positions
from bridge.provider import GPTModelProvider
from bridge.rotary import (
    DecoderRotaryEmbedding,
    attention_factor,
    inverse_frequencies,
    set_attention_factor,
)

CPU = torch.device("cpu")

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


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.initialize(GPTModelProvider(**attention_formula.SHAPES))
    yield
    distributed.finalize()


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


def test_a_rope_that_turns_nothing_is_refused() -> None:
    sizes = {"max_position_embeddings": 64}
    for config in ({"rope_theta": 0}, {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}):
        with pytest.raises(UnsupportedModelError, match=r"rope_theta (0|-1.0): give a number above 0"):
            Rope().read({**sizes, **config})
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor 0: give a number above 0"):
        Rope(partial=0.5).read({**sizes, "partial_rotary_factor": 0})


def test_longrope_follows_the_length_of_each_sequence(process_group: None) -> None:
    config = LlamaConfig(
        head_dim=16,
        max_position_embeddings=1024,
        rope_parameters=longrope(16, rope_theta=10000.0, original_max_position_embeddings=64),
    )
    provider = provider_of(config.to_dict())
    embedding, expected = DecoderRotaryEmbedding(provider, CPU), LlamaRotaryEmbedding(config)
    for length in (40, 100, 64, 65):
        cosines = expected(torch.zeros(1), torch.arange(length)[None])[0][0]
        found = embedding.get_emb(length)[:, 0, 0].cos() * attention_factor(provider)
        torch.testing.assert_close(found, cosines, rtol=1e-5, atol=1e-5)


def test_layers_with_a_window_have_a_rope_of_their_own(process_group: None) -> None:
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    }
    config = Gemma3TextConfig(head_dim=16, rope_parameters=ropes)
    angles = DecoderRotaryEmbedding(provider_of(config.to_dict()), CPU).get_emb(40)
    expected = Gemma3RotaryEmbedding(config)
    for number, layer_type in enumerate(("full_attention", "sliding_attention")):
        cosines = expected(torch.zeros(1), torch.arange(40)[None], layer_type)[0][0]
        torch.testing.assert_close(angles[:, number, 0].cos(), cosines, rtol=1e-5, atol=1e-5)


def test_half_of_nemotrons_channels_turn() -> None:
    config = NemotronConfig(hidden_size=512, num_attention_heads=8)
    frequencies = inverse_frequencies(provider_of(config.to_dict()))
    torch.testing.assert_close(frequencies, NemotronRotaryEmbedding(config).inv_freq)
    assert len(frequencies) == 16


def test_queries_grow_with_the_position_in_their_own_sequence(process_group: None) -> None:
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 5, 12], dtype=torch.int32))
    query = torch.ones(12, 4, 8)
    whole, parts = query_positions(query, None), query_positions(query, packed)
    assert whole.tolist() == list(range(12))
    assert parts.tolist() == [*range(5), *range(7)]
    scale = position_scale(whole, beta=0.1, original_length=4)
    torch.testing.assert_close(scale, get_llama_4_attn_scale(whole[None], 0.1, 4).flatten())
