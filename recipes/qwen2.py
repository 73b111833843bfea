"""Recipes for Qwen2 and Qwen2.5: sizes as in the released checkpoints, context lengths as on their cards."""

from typing import Any

from recipes.pretraining import pretrain_config
from training.config import ConfigContainer

QWEN2 = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
# from 7B on
LONG = {"max_position_embeddings": 131072}
# from 14B on
LARGE = {**LONG, "rms_norm_eps": 1e-5}


def _size(
    layers: int, hidden: int, intermediate: int, heads: int, groups: int, vocab: int, *, tied: bool = False
) -> dict[str, int | bool]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SIZE_500M = _size(24, 896, 4864, 14, 2, 151936, tied=True)
SIZE_1P5B = _size(28, 1536, 8960, 12, 2, 151936, tied=True)
SIZE_3B = _size(36, 2048, 11008, 16, 2, 151936, tied=True)
SIZE_7B = _size(28, 3584, 18944, 28, 4, 152064)
SIZE_14B = _size(48, 5120, 13824, 40, 8, 152064)
SIZE_32B = _size(64, 5120, 27648, 40, 8, 152064)
SIZE_72B = _size(80, 8192, 29568, 64, 8, 152064)


def qwen2_500m_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2 0.5B, for 8 H100s or more."""
    return pretrain_config({**QWEN2, **SIZE_500M}, changes)


def qwen2_1p5b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2 1.5B, for 8 H100s or more."""
    return pretrain_config({**QWEN2, **SIZE_1P5B}, changes)


def qwen2_7b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2 7B, for 8 H100s or more."""
    return pretrain_config({**QWEN2, **LONG, **SIZE_7B}, changes, tensor=2)


def qwen2_72b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2 72B, for 32 H100s or more."""
    return pretrain_config({**QWEN2, **LARGE, **SIZE_72B}, changes, lr=1.5e-4, tensor=8, pipeline=4)


def qwen25_500m_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2.5 0.5B, for 8 H100s or more."""
    return qwen2_500m_pretrain_config(**changes)


def qwen25_1p5b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2.5 1.5B, for 8 H100s or more."""
    return qwen2_1p5b_pretrain_config(**changes)


def qwen25_3b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2.5 3B, for 8 H100s or more."""
    return pretrain_config({**QWEN2, **SIZE_3B}, changes)


def qwen25_7b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2.5 7B, for 8 H100s or more."""
    return qwen2_7b_pretrain_config(**changes)


def qwen25_14b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2.5 14B, for 8 H100s or more."""
    return pretrain_config({**QWEN2, **LARGE, **SIZE_14B}, changes, tensor=4)


def qwen25_32b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2.5 32B, for 16 H100s or more."""
    return pretrain_config({**QWEN2, **LARGE, **SIZE_32B}, changes, lr=1.5e-4, tensor=8, pipeline=2)


def qwen25_72b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen2.5 72B, for 32 H100s or more."""
    return pretrain_config({**QWEN2, **LARGE, **SIZE_72B}, changes, lr=1.5e-4, tensor=8, pipeline=4)
