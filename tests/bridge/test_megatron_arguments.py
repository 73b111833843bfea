"""Checkpoints of plain Megatron-LM: no model.json, no hf/, arguments in common.pt, keys in several forms."""

import argparse
import enum
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import copy_checkpoint, edit_json

from bridge.errors import CheckpointError, ConfigError
from bridge.exporter import export_checkpoint
from bridge.importer import import_checkpoint
from bridge.ledger import compare_ledgers, ledger
from bridge.megatron_arguments import read_arguments
from bridge.megatron_checkpoint import HF_FOLDER, MODEL

Checkpoints = Callable[..., Path]


class AttnBackend(enum.Enum):
    auto = 5


class Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("attacked",)


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
    "padded_vocab_size": 256,
    "num_experts": None,
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "attention_backend": AttnBackend.auto,
    "data_path": [Path("data/text")],
}


@pytest.fixture
def plain(hf_checkpoint: Checkpoints, megatron_checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A run's folder as Megatron-LM leaves it."""
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    run = tmp_path / "run"
    folder = copy_checkpoint(megatron_checkpoint("llama", **settings), run / "iter_0000010")
    shutil.rmtree(folder / HF_FOLDER)
    (folder / MODEL).unlink()
    (run / "latest_checkpointed_iteration.txt").write_text("10")
    save_arguments(folder)
    copy_checkpoint(hf_checkpoint("llama", **settings), tmp_path / "source")
    return run


def save_arguments(folder: Path, **changes: Any) -> None:
    arguments = argparse.Namespace(**{**ARGUMENTS, **changes})
    torch.save({"args": arguments, "iteration": 10, "checkpoint_version": 3.0}, folder / "common.pt")


def test_exports_with_a_config_that_fits(plain: Path, tmp_path: Path) -> None:
    export_checkpoint(plain, tmp_path / "hf", config_from=tmp_path / "source")
    assert compare_ledgers(ledger(tmp_path / "source"), ledger(tmp_path / "hf")).passed


def test_exports_with_the_family_alone(plain: Path, tmp_path: Path) -> None:
    export_checkpoint(plain, tmp_path / "hf", family="llama")
    assert compare_ledgers(ledger(tmp_path / "source"), ledger(tmp_path / "hf")).passed
    import_checkpoint(tmp_path / "hf", tmp_path / "again")
    from transformers import AutoModelForCausalLM

    found, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("hf", "source")
    )
    tokens = torch.arange(40)[None]
    assert torch.equal(found(tokens).logits, expected(tokens).logits)


def test_names_every_contradiction(plain: Path, tmp_path: Path) -> None:
    edit_json(tmp_path / "source" / "config.json", num_key_value_heads=8, rms_norm_eps=1e-5, vocab_size=300)
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(plain, tmp_path / "hf", config_from=tmp_path / "source")
    for part in (
        "num_query_groups is 8, trained was 4",
        "layernorm_epsilon is 1e-05, trained was 1e-06",
        "vocab_size is 300, trained was 256 with its padding",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"rotary_base": 500000}, "rotary_base"),
        ({"num_experts": 8}, "num_moe_experts"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"swiglu": False}, "gated_linear_unit"),
        ({"untie_embeddings_and_output_weights": False}, "share_embeddings_and_output_weights"),
    ],
)
def test_what_the_weights_do_not_show_is_held_against_the_arguments(
    arguments: dict[str, Any], field: str, plain: Path, tmp_path: Path
) -> None:
    save_arguments(plain / "iter_0000010", **arguments)
    with pytest.raises(ConfigError, match=f"{field} is"):
        export_checkpoint(plain, tmp_path / "hf", config_from=tmp_path / "source")


def test_says_what_to_name(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no model\.json: name a Hugging Face folder .* its family"
    ):
        export_checkpoint(plain, tmp_path / "hf")
    torch.save({}, plain / "iter_0000010" / "common.pt")
    with pytest.raises(CheckpointError, match="holds no arguments of Megatron-LM"):
        export_checkpoint(plain, tmp_path / "hf", family="llama")


def test_runs_no_code(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_arguments(plain / "iter_0000010", attack=Attack())
    arguments = read_arguments(plain / "iter_0000010")
    assert arguments is not None
    assert arguments["num_layers"] == 4
    assert not (tmp_path / "attacked").exists()
