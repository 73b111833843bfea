from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bridge.errors import UnsupportedModelError
from bridge.families import provider_of
from bridge.rotary import inverse_frequencies

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1000000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {**LLAMA31, "rope_theta": 500000.0},
        {**LLAMA31, "rope_theta": 500000.0, "factor": 32.0},
        {**LLAMA31, "rope_theta": 300000.0, "low_freq_factor": 2.0, "high_freq_factor": 7.0},
        {**LLAMA31, "rope_theta": 500000.0, "original_max_position_embeddings": 512},
    ],
)
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope)
    expected = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(
        inverse_frequencies(provider_of(config.to_dict())), expected, rtol=2e-6, atol=0
    )


def test_unknown_rope_type_is_refused() -> None:
    provider = provider_of(LlamaConfig().to_dict())
    provider.rope_parameters = {"rope_type": "spiral"}
    with pytest.raises(
        UnsupportedModelError, match="unknown rope type 'spiral': allowed are default, linear"
    ):
        inverse_frequencies(provider)
