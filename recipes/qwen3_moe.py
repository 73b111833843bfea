"""Recipes for Qwen3's mixtures of experts: sizes as in the released checkpoints' config.json."""

from typing import Any

from recipes.pretraining import pretrain_config
from training.config import ConfigContainer

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
    "use_sliding_window": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def _size(layers: int, hidden: int, intermediate: int, moe_intermediate: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "moe_intermediate_size": moe_intermediate,
        "num_attention_heads": heads,
    }


SIZE_30B_A3B = _size(48, 2048, 6144, 768, 32)
SIZE_235B_A22B = _size(94, 4096, 12288, 1536, 64)


def qwen3_30b_a3b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen3 30B-A3B, for 16 H100s or more."""
    return pretrain_config({**QWEN3_MOE, **SIZE_30B_A3B}, changes, tensor=4, pipeline=2, expert=4)


def qwen3_235b_a22b_pretrain_config(**changes: Any) -> ConfigContainer:
    """Return a pretraining config for Qwen3 235B-A22B, for 128 H100s or more."""
    # 94 layers, embedding and loss are 96, which 16 stages share out evenly
    sizes = {"tensor": 4, "pipeline": 16, "context": 2, "expert": 8}
    return pretrain_config({**QWEN3_MOE, **SIZE_235B_A22B}, changes, lr=1.5e-4, **sizes, outer_count=True)
