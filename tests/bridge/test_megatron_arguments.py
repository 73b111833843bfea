"""Checkpoints of plain Megatron-LM: no model.json, no hf/, arguments in common.pt, keys in several forms."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import copy_checkpoint, edit_json
from plain_checkpoints import ROPE, make_plain_run, save_arguments

from bridge.errors import BridgeworksError, CheckpointError, ConfigError
from bridge.exporter import export_checkpoint
from bridge.importer import import_checkpoint
from bridge.ledger import compare_ledgers, ledger
from bridge.megatron_arguments import contradictions, read_arguments
from bridge.provider import GPTModelProvider

Checkpoints = Callable[..., Path]


class Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("attacked",)


@pytest.fixture
def plain(hf_checkpoint: Checkpoints, megatron_checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A run's folder as Megatron-LM leaves it; what it was imported from is copied beside it."""
    copy_checkpoint(hf_checkpoint("llama", **ROPE), tmp_path / "source")
    return make_plain_run(megatron_checkpoint("llama", **ROPE), tmp_path / "run")


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
        "vocab_size is 300, trained was 160 with its padding",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"rotary_base": 500000}, "rotary_base"),
        ({"num_experts": 8}, "num_moe_experts"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"use_rope_scaling": True}, r"rope_parameters\.rope_type"),
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


def test_scaling_of_the_rope_is_held_against_every_number(plain: Path, tmp_path: Path) -> None:
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**ROPE["rope_parameters"], "rope_type": "llama3", **scaling}
    edit_json(
        tmp_path / "source" / "config.json",
        rope_parameters={**rope, "original_max_position_embeddings": 4096},
    )
    save_arguments(plain / "iter_0000010", use_rope_scaling=True)
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(plain, tmp_path / "hf", config_from=tmp_path / "source")
    assert "rope_parameters.factor is 4.0, trained was 8.0; rope_parameters.original" in str(caught.value)
    assert "low_freq" not in str(caught.value)


def test_another_megatron_checkpoint_describes_one_as_well(
    plain: Path, megatron_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    export_checkpoint(plain, tmp_path / "hf", config_from=megatron_checkpoint("llama", **ROPE))
    assert compare_ledgers(ledger(tmp_path / "source"), ledger(tmp_path / "hf")).passed
    assert (tmp_path / "hf" / "generation_config.json").is_file()
    with pytest.raises(ConfigError, match=r"model\.json is not of the model .* rotary_base is 500000\.0"):
        export_checkpoint(plain, tmp_path / "other", config_from=megatron_checkpoint("llama"))


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


OTHER_MODELS = {
    "rotary_interleaved": True,
    "apply_layernorm_1p": True,
    "window_size": (3, 0),
    "softmax_type": "learnable",
    "softmax_scale": 0.3,
    "mtp_num_layers": 1,
    "multi_latent_attention": True,
    "swiglu": False,
    "quick_geglu": True,
    "squared_relu": True,
    "qk_l2_norm": True,
    "no_rope_freq": [1, 0],
    "rotary_seq_len_interpolation_factor": 4,
    "attention_output_gate": True,
    "apply_residual_connection_post_layernorm": True,
    "hybrid_override_pattern": "M*",
    "openai_gelu": True,
}


@pytest.mark.parametrize("name", OTHER_MODELS)
@pytest.mark.parametrize("described_by", ["a config", "the family"])
def test_what_changes_the_model_is_never_ignored(
    name: str, described_by: str, plain: Path, tmp_path: Path
) -> None:
    changes = {"swiglu": False} if name in ("quick_geglu", "squared_relu") else {}
    save_arguments(plain / "iter_0000010", **changes, **{name: OTHER_MODELS[name]})
    how = {"config_from": tmp_path / "source"} if described_by == "a config" else {"family": "llama"}
    with pytest.raises(BridgeworksError):
        export_checkpoint(plain, tmp_path / "hf", **how)
    assert not (tmp_path / "hf").exists()


def test_layers_with_experts_are_compared() -> None:
    provider = GPTModelProvider(num_layers=4, num_moe_experts=8, moe_layer_freq=[0, 1, 1, 1])
    named = {"num_experts": 8, "num_attention_heads": 0, "untie_embeddings_and_output_weights": True}
    assert not [
        c for c in contradictions(provider, {**named, "moe_layer_freq": [0, 1, 1, 1]}) if "layers" in c.name
    ]
    (found,) = [c for c in contradictions(provider, {**named, "moe_layer_freq": 2}) if "layers" in c.name]
    assert found.trained == [True, False, True, False]
