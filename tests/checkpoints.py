"""Tiny Hugging Face checkpoints for tests, made by transformers itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from prediction_layers import add_prediction_layers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

# A head size that is not hidden_size / heads, and a vocabulary that needs padding, on purpose.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 160,
    "max_position_embeddings": 512,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 64,
}


def longrope(channels: int, partial: float) -> dict[str, Any]:
    """Return rope parameters with other factors for short sequences than for those beyond 24 tokens."""
    factors = [1 + 0.3 * pair for pair in range(channels // 2)]
    return {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "partial_rotary_factor": partial,
        "short_factor": factors,
        "long_factor": [2 * factor for factor in factors],
        "original_max_position_embeddings": 24,
    }


# Weights of the usual size would leave all experts about equal.
EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 48, "initializer_range": 0.1}

# transformers makes this token's embedding zero, and gradients through norms of zero vectors grow without
# bound: a token that the tests do not use.
PADDING = 159

# A setting whose value is null, where None leaves the key to transformers' default.
NULL = "null"

LATENT_ATTENTION = {
    "head_dim": None,
    "num_key_value_heads": 8,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    # other than that of the latents' norms
    "rms_norm_eps": 1e-2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 8,
        "beta_slow": 1,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
    },
}

# What is special to a family is switched on, so that the ordinary tests see it.
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **EXPERTS,
        **LATENT_ATTENTION,
        "q_lora_rank": NULL,
        "topk_method": "group_limited_greedy",
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 4.0,
    },
    "deepseek_v3": {
        **EXPERTS,
        **LATENT_ATTENTION,
        "q_lora_rank": 24,
        "num_experts_per_tok": 4,
        # transformers neither makes nor loads these
        "num_nextn_predict_layers": 0,
    },
    "gemma": {"initializer_range": 0.1, "pad_token_id": PADDING},
    "gemma2": {
        "initializer_range": 0.1,
        "pad_token_id": PADDING,
        "sliding_window": 12,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
    },
    # the sixth layer is the only one without a window
    "gemma3_text": {
        "num_hidden_layers": 8,
        "initializer_range": 0.1,
        "pad_token_id": PADDING,
        "sliding_window": 12,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
        },
    },
    "glm4_moe": {
        **EXPERTS,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
        "use_qk_norm": True,
        # transformers neither makes nor loads these
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "initializer_range": 0.1,
        "sliding_window": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 12},
    "mixtral": {"num_local_experts": 8, "sliding_window": 12, "initializer_range": 0.1},
    "olmoe": {**EXPERTS, "head_dim": None, "moe_intermediate_size": None, "num_experts": 8},
    "nemotron": {"initializer_range": 0.1},
    "olmo2": {"head_dim": None, "initializer_range": 0.1, "pad_token_id": PADDING},
    "phi3": {
        "head_dim": None,
        "initializer_range": 0.1,
        "sliding_window": 12,
        "pad_token_id": PADDING,
        "original_max_position_embeddings": 24,
        "rope_parameters": longrope(6, partial=0.75),
    },
    "ministral3": {
        "initializer_range": 0.1,
        "pad_token_id": PADDING,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 50.0,
            "factor": 8.0,
            "original_max_position_embeddings": 12,
            "max_position_embeddings": 512,
            "beta_fast": 0.8,
            "beta_slow": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "qwen2": {"head_dim": None},  # Qwen2's config has no head_dim
    "qwen2_moe": {
        **EXPERTS,
        "head_dim": None,
        "num_experts": 8,
        "shared_expert_intermediate_size": 96,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {**EXPERTS, "num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [1]},
}


def make_hf_checkpoint(
    folder: Path,
    family: str,
    *,
    dtype: str = "bfloat16",
    max_shard_size: str = "150KB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a random model of `family` in `folder`, in several shards with an index; return `folder`.

    `config` holds Hugging Face config values over those of `SIZES` and `FAMILY_SETTINGS`.
    """
    values = {**SIZES, **FAMILY_SETTINGS.get(family, {}), **config}
    hf_config = AutoConfig.for_model(family, **given(values))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        _randomize_vectors(model)
    _cast(model, getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if values.get("num_nextn_predict_layers"):
        add_prediction_layers(Path(folder))
    return Path(folder)


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as arguments of a transformers config."""
    return {key: None if value == NULL else value for key, value in settings.items() if value is not None}


def _randomize_vectors(model: torch.nn.Module) -> None:
    """Give norms and biases values of their own: a swap of two that are all ones goes unseen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        for bias in _float32_biases(model).values():
            bias.add_(0.2 * torch.randn_like(bias))


def _float32_biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the biases for the choice of experts, which releases have in float32 whatever the rest is."""
    return {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    kept = {name: bias.clone() for name, bias in _float32_biases(model).items()}
    model.to(dtype)
    for name, bias in kept.items():
        model.get_buffer(name).data = bias
    return model


def as_stored(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with the names of a model's parameters as its files have them, experts one by one."""
    return revert_weight_conversion(model, dict(tensors))


def copy_checkpoint(source: Path, destination: Path) -> Path:
    """Copy a shared checkpoint for a test that changes it; return `destination`."""
    shutil.copytree(source, destination)
    return destination


def change_weight(folder: Path, name: str) -> None:
    """Change one number of a tensor in a Hugging Face folder."""
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of None removes the key."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
