"""Recipes for Qwen3's dense models: sizes as in the released checkpoints' config.json."""

from typing import Any

from recipes.pretraining import pretrain_config
from training.config import ConfigContainer

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "attention_bias": False,
}


def _size(
    layers: int, hidden: int, intermediate: int, heads: int, groups: int = 8, *, tied: bool = False
) -> dict[str, int | bool]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": tied,
    }


SIZE_600M = _size(28, 1024, 3072, 16, tied=True)
SIZE_1P7B = _size(28, 2048, 6144, 16, tied=True)
SIZE_4B = _size(36, 2560, 9728, 32, tied=True)
SIZE_8B = _size(36, 4096, 12288, 32)
SIZE_14B = _size(40, 5120, 17408, 40)
SIZE_32B = _size(64, 5120, 25600, 64)


def qwen3_600m_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen3 0.6B, for 8 H100s or more."""
    return pretrain_config({**QWEN3, **SIZE_600M}, changes)


def qwen3_1p7b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen3 1.7B, for 8 H100s or more."""
    return pretrain_config({**QWEN3, **SIZE_1P7B}, changes)


def qwen3_4b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen3 4B, for 8 H100s or more."""
    return pretrain_config({**QWEN3, **SIZE_4B}, changes, tensor=2)


def qwen3_8b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen3 8B, for 8 H100s or more."""
    return pretrain_config({**QWEN3, **SIZE_8B}, changes, tensor=4)


def qwen3_14b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen3 14B, for 8 H100s or more."""
    return pretrain_config({**QWEN3, **SIZE_14B}, changes, tensor=8)


def qwen3_32b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen3 32B, for 16 H100s or more."""
    return pretrain_config({**QWEN3, **SIZE_32B}, changes, lr=1.5e-4, tensor=8, pipeline=2)
