"""Recipes for Mistral 7B: sizes as in the released checkpoint's config.json."""

from typing import Any

from recipes.pretraining import pretrain_config
from training.config import ConfigContainer

MISTRAL_7B = {
    "model_type": "mistral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def mistral_7b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Mistral 7B v0.3, for 8 H100s or more."""
    return pretrain_config(MISTRAL_7B, changes, tensor=2)
