import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import copy_checkpoint, edit_json
from plain_checkpoints import ROPE, make_plain_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from bridge import AutoBridge, distributed
from bridge.errors import CheckpointError, ConfigError, CoverageError, InputError, UnsupportedModelError
from bridge.families import families
from bridge.ledger import compare_ledgers, ledger

# As users of Megatron Bridge write it, but for the import.
QUICK_START = """
import sys
from bridge import AutoBridge

source, folder = sys.argv[1], sys.argv[2]
bridge = AutoBridge.from_hf_pretrained(source)
provider = bridge.to_megatron_provider()
provider.tensor_model_parallel_size = 1
provider.pipeline_model_parallel_size = 1
provider.finalize()
model = provider.provide_distributed_model(wrap_with_ddp=False)
bridge.save_hf_pretrained(model, f"{folder}/saved")
for name, weight in bridge.export_hf_weights(model, cpu=True):
    print(name, tuple(weight.shape))
AutoBridge.import_ckpt(source, f"{folder}/megatron")
bridge.export_ckpt(f"{folder}/megatron", f"{folder}/exported")
"""


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


def same_weights(a: Path, b: Path) -> bool:
    return compare_ledgers(ledger(a), ledger(b)).passed


def test_quick_start_of_megatron_bridge(hf_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_checkpoint("llama")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", QUICK_START, str(source), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    ).stdout
    assert "lm_head.weight (160, 64)" in printed
    for folder in ("saved", "exported"):
        assert same_weights(source, tmp_path / folder)
        assert (tmp_path / folder / "config.json").read_text() == (source / "config.json").read_text()


@pytest.mark.parametrize("family", families())
def test_saved_model_is_loaded_by_transformers(
    family: str, hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = hf_checkpoint(family)
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    bridge.save_hf_pretrained(model, tmp_path / "saved", max_shard_size="100KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_megatron_models_are_saved_and_loaded(hf_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_checkpoint("qwen2")
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_megatron_model(bridge.to_megatron_model(wrap_with_ddp=False), tmp_path / "megatron")
    assert same_weights(source, tmp_path / "megatron")
    model = bridge.load_megatron_model(tmp_path / "megatron", params_dtype="float32", wrap_with_ddp=False)
    weights = dict(bridge.export_hf_weights(model))
    file = next(source.glob("*.safetensors"))
    assert all(torch.equal(weights[name], weight.float()) for name, weight in load_file(file).items())


def test_weights_of_another_folder_replace_those_of_a_model(hf_checkpoint: Callable[..., Path]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf_checkpoint("llama"))
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    other = hf_checkpoint("llama", seed=1)
    bridge.load_hf_weights(model, other)
    weights = dict(bridge.export_hf_weights(model))
    file = next(other.glob("*.safetensors"))
    assert all(torch.equal(weights[name], weight) for name, weight in load_file(file).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, r"rope_theta is 10000\.0 there"),
        ({"rms_norm_eps": 1e-2}, r"layernorm_epsilon is 0\.01 there and 1e-06 here"),
        # the same shapes, in other heads
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}, "kv_channels is 32 there"),
    ],
)
def test_weights_of_another_model_are_refused(
    settings: dict[str, Any], message: str, hf_checkpoint: Callable[..., Path]
) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf_checkpoint("llama"))
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    with pytest.raises(ConfigError, match=f"llama.* is not of this bridge's model: .*{message}"):
        bridge.load_hf_weights(model, hf_checkpoint("llama", **settings))


def test_weights_of_a_longer_context_and_another_dtype_are_taken(hf_checkpoint: Callable[..., Path]) -> None:
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    bridge = AutoBridge.from_hf_pretrained(hf_checkpoint("qwen2", **settings))
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    other = hf_checkpoint("qwen2", dtype="float32", max_position_embeddings=1024, **settings)
    bridge.load_hf_weights(model, other)
    file = next(other.glob("*.safetensors"))
    weights = dict(bridge.export_hf_weights(model))
    assert all(torch.equal(weights[name], weight.bfloat16()) for name, weight in load_file(file).items())


@pytest.mark.parametrize("add_qkv_bias", [True, False])
def test_a_model_with_other_tensors_than_its_family_is_refused(
    add_qkv_bias: bool, hf_checkpoint: Callable[..., Path]
) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf_checkpoint("llama" if add_qkv_bias else "qwen2"))
    provider = bridge.to_megatron_provider()
    provider.add_qkv_bias = add_qkv_bias
    with pytest.raises(CoverageError, match=r"linear_qkv\.bias \[\d\], which its family has"):
        provider.provide_distributed_model(wrap_with_ddp=False)


def test_conversions_take_dtypes_and_sizes_as_the_other_methods_do(
    hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = hf_checkpoint("llama")
    AutoBridge.import_ckpt(source, tmp_path / "megatron", dtype=torch.float32, max_memory=10**9)
    bridge = AutoBridge.from_hf_pretrained(source)
    exported = tmp_path / "exported"
    bridge.export_ckpt(tmp_path / "megatron", exported, dtype=torch.bfloat16, max_shard_size=100_000)
    assert len(list(exported.glob("*.safetensors"))) > 1
    assert same_weights(source, exported)


def test_a_plain_run_of_megatron_lm_is_exported_by_the_bridges_config(
    hf_checkpoint: Callable[..., Path], megatron_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = hf_checkpoint("llama", **ROPE)
    run = make_plain_run(megatron_checkpoint("llama", **ROPE), tmp_path / "run")
    AutoBridge.from_hf_pretrained(source).export_ckpt(run, tmp_path / "exported")
    assert same_weights(source, tmp_path / "exported")
    with pytest.raises(ConfigError, match=r"rope_parameters.*trained was"):
        AutoBridge.from_hf_pretrained(hf_checkpoint("llama")).export_ckpt(run, tmp_path / "other")


def test_weights_are_not_saved_beside_others(hf_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """transformers would read the single file that was there before, rather than the shards."""
    bridge = AutoBridge.from_hf_pretrained(hf_checkpoint("llama"))
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    with pytest.raises(InputError, match="is no folder"):
        bridge.save_hf_weights(model, tmp_path / "saved")
    (tmp_path / "saved").mkdir()
    bridge.save_hf_weights(model, tmp_path / "saved")
    with pytest.raises(InputError, match=r"holds weights already, model\.safetensors"):
        bridge.save_hf_weights(model, tmp_path / "saved", max_shard_size="100KB")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["model.safetensors"]


def test_bridge_from_a_config_has_no_weights() -> None:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=100)
    bridge = AutoBridge.from_hf_config(config)
    assert bridge.transformer_config.num_layers == 2
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    with pytest.raises(ConfigError, match="made from a config alone"):
        bridge.load_hf_weights(model)


def test_supported_models(hf_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    assert "LlamaForCausalLM" in AutoBridge.list_supported_models()
    folder = copy_checkpoint(hf_checkpoint("llama"), tmp_path / "copy")
    assert AutoBridge.can_handle(folder)
    for change in {"num_key_value_heads": 3}, {"num_hidden_layers": -1}, {"model_type": "never_heard_of"}:
        edit_json(folder / "config.json", **change)
        assert not AutoBridge.can_handle(folder)


def test_code_of_a_checkpoint_is_refused_unless_asked_for(
    hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_checkpoint(hf_checkpoint("llama"), tmp_path / "copy")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    with pytest.raises(UnsupportedModelError, match="names code of its own"):
        AutoBridge.from_hf_pretrained(folder)
    bridge = AutoBridge.from_hf_pretrained(folder, trust_remote_code=True)
    bridge.save_hf_pretrained(bridge.to_megatron_model(wrap_with_ddp=False), tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_missing_folder_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="/no/such/folder is not a folder"):
        AutoBridge.from_hf_pretrained("/no/such/folder")
