"""Recipes for Llama 2, 3, 3.1 and 3.2: sizes as in the released checkpoints' config.json."""

from typing import Any

from recipes.pretraining import pretrain_config
from training.config import ConfigContainer

LLAMA2 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {**LLAMA2, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}


def _scaled_rope(factor: float) -> dict[str, Any]:
    return {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


LLAMA31 = {**LLAMA3, **_scaled_rope(8.0)}
LLAMA32 = {**LLAMA3, **_scaled_rope(32.0), "tie_word_embeddings": True}


def _size(
    layers: int, hidden: int, intermediate: int, heads: int, groups: int, head_dim: int = 128
) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }


SIZE_1B = _size(16, 2048, 8192, 32, 8, head_dim=64)
SIZE_3B = _size(28, 3072, 8192, 24, 8)
SIZE_7B = _size(32, 4096, 11008, 32, 32)
SIZE_8B = _size(32, 4096, 14336, 32, 8)
SIZE_70B = _size(80, 8192, 28672, 64, 8)
SIZE_405B = _size(126, 16384, 53248, 128, 8)


def llama2_7b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Llama 2 7B, for 8 H100s or more."""
    return pretrain_config({**LLAMA2, **SIZE_7B}, changes, tensor=2)


def llama3_8b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Llama 3 8B, for 8 H100s or more."""
    return pretrain_config({**LLAMA3, **SIZE_8B}, changes, tensor=2)


def llama3_70b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Llama 3 70B, for 64 H100s or more."""
    return pretrain_config({**LLAMA3, **SIZE_70B}, changes, lr=1.5e-4, tensor=4, pipeline=4, context=2)


def llama31_8b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Llama 3.1 8B, for 8 H100s or more."""
    return pretrain_config({**LLAMA31, **SIZE_8B}, changes, tensor=2)


def llama31_70b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Llama 3.1 70B, for 64 H100s or more."""
    return pretrain_config({**LLAMA31, **SIZE_70B}, changes, lr=1.5e-4, tensor=4, pipeline=4, context=2)


def llama31_405b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Llama 3.1 405B, for 512 H100s or more."""
    # 126 layers, embedding and loss are 128: two for each of 8 chunks of 8 stages
    sizes = {"tensor": 8, "pipeline": 8, "virtual": 8, "context": 4}
    return pretrain_config({**LLAMA31, **SIZE_405B}, changes, lr=8e-5, **sizes, outer_count=True)


def llama32_1b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Llama 3.2 1B, for 8 H100s or more."""
    return pretrain_config({**LLAMA32, **SIZE_1B}, changes)


def llama32_3b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Llama 3.2 3B, for 8 H100s or more."""
    return pretrain_config({**LLAMA32, **SIZE_3B}, changes)
