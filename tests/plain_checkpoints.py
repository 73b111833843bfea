"""Checkpoints as plain Megatron-LM leaves them: no model.json, no hf/, arguments in common.pt."""

import argparse
import enum
import shutil
from pathlib import Path
from typing import Any

import torch
from checkpoints import copy_checkpoint

from bridge.megatron_checkpoint import HF_FOLDER, MODEL

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
"""Settings over those of the tests' Llama, which Megatron Core's scaling could not have trained."""


class AttnBackend(enum.Enum):
    auto = 5


ARGUMENTS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 16,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "max_position_embeddings": 512,
    "vocab_size": 160,
    "make_vocab_size_divisible_by": 32,
    "tensor_model_parallel_size": 1,
    "padded_vocab_size": 160,
    "num_experts": None,
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "attention_backend": AttnBackend.auto,
    "data_path": [Path("data/text")],
}


def make_plain_run(megatron: Path, run: Path) -> Path:
    """Copy an imported Llama with `ROPE` as the last checkpoint of a run of Megatron-LM; return `run`."""
    folder = copy_checkpoint(megatron, run / "iter_0000010")
    shutil.rmtree(folder / HF_FOLDER)
    (folder / MODEL).unlink()
    (run / "latest_checkpointed_iteration.txt").write_text("10")
    save_arguments(folder)
    return run


def save_arguments(folder: Path, **changes: Any) -> None:
    arguments = argparse.Namespace(**{**ARGUMENTS, **changes})
    torch.save({"args": arguments, "iteration": 10, "checkpoint_version": 3.0}, folder / "common.pt")
