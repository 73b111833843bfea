import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import copy_checkpoint, edit_json
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as distributed_checkpoint

from bridge.errors import CheckpointError, CoverageError, InputError, UnsupportedModelError
from bridge.families import families, plan_weights, provider_of
from bridge.hf_checkpoint import HfCheckpoint
from bridge.importer import import_checkpoint
from bridge.torch_dist.metadata import read_metadata

Checkpoints = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def single_file(hf_checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint in one file, easy to change."""
    source = copy_checkpoint(hf_checkpoint("llama"), tmp_path / "source")
    tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in source.glob("model*"):
        file.unlink()
    save_file(tensors, source / "model.safetensors")
    return source


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def as_embedding_model(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


NORM = "model.layers.1.input_layernorm.weight"
BAD_TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop(NORM), f"lacks '{NORM}'"),
    "two missing": (lambda t: [t.pop(NORM), t.pop("model.norm.weight")], "and 1 more tensors"),
    "no output": (lambda t: t.pop("lm_head.weight"), "no language model, unless"),
    "an embedding model's": (as_embedding_model, "set tie_word_embeddings to true"),
    "left over": (lambda t: t.update(extra=torch.zeros(3)), "holds 'extra'"),
    "other shape": (lambda t: t.update({NORM: torch.zeros(63).bfloat16()}), "has shape \\[63\\]"),
    "transposed": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 128).bfloat16()}),
        "up_proj.weight' has shape \\[64, 128\\]",
    ),
    "integers": (lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int32)}), "has dtype int32"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_refuses_tensors_that_the_config_does_not_declare(case: str, single_file: Path) -> None:
    edit, message = BAD_TENSORS[case]
    change(single_file, edit)
    with pytest.raises(CoverageError, match=message):
        import_checkpoint(single_file, single_file.parent / "megatron")
    assert [path.name for path in single_file.parent.iterdir()] == ["source"]


def test_names_of_an_embedding_model_are_answered_by_what_to_do(single_file: Path) -> None:
    edit_json(single_file / "config.json", tie_word_embeddings=True)
    change(single_file, as_embedding_model)
    with pytest.raises(CoverageError, match="load it by AutoModelForCausalLM and save it anew"):
        import_checkpoint(single_file, single_file.parent / "megatron")


def test_listed_buffers_are_no_weights(single_file: Path) -> None:
    change(single_file, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert import_checkpoint(single_file, single_file.parent / "megatron").tensors == 39


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt9"}, "unknown model_type 'gpt9'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope type 'spiral'"),
        ({"surprise": 1}, "'surprise'"),
    ],
)
def test_refuses_configs(changes: dict[str, object], message: str, single_file: Path) -> None:
    edit_json(single_file / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        import_checkpoint(single_file, single_file.parent / "megatron")
    assert not (single_file.parent / "megatron").exists()


def test_refuses_when_space_is_short(
    hf_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="KB free"):
        import_checkpoint(hf_checkpoint("llama"), tmp_path / "megatron")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["shorter", "written anew"])
def test_a_source_that_changes_meanwhile_is_an_error(change: str, single_file: Path) -> None:
    """What is missing of a mapped file's last page is read as zeros, without an error."""
    file = single_file / "model.safetensors"
    size = file.stat().st_size

    def edit(done: int, total: int) -> None:
        os.truncate(file, size - 100) if change == "shorter" else file.touch()

    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while it was read"):
        import_checkpoint(single_file, single_file.parent / "megatron", workers=1, progress=edit)
    assert [path.name for path in single_file.parent.iterdir()] == ["source"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_disk_that_fills_is_said_in_one_line(
    hf_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def full(path: Path, flags: int, *mode: int, **where: int) -> int:
        return real(
            "/dev/full" if Path(path).suffix == ".distcp" else path, flags & ~os.O_EXCL, *mode, **where
        )

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(InputError, match="no space was left while writing"):
        import_checkpoint(hf_checkpoint("llama"), tmp_path / "megatron")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("family", families())
def test_torch_reads_the_tensors(
    family: str, hf_checkpoint: Checkpoints, megatron_checkpoint: Checkpoints
) -> None:
    """Block by block, the tensors hold what the weight rules say."""
    checkpoint = HfCheckpoint.open(hf_checkpoint(family))
    plan = plan_weights(provider_of(checkpoint.config))
    hf = {n: t for file in checkpoint.path.glob("*.safetensors") for n, t in load_file(file).items()}
    megatron = load_with_torch(megatron_checkpoint(family))
    assert {key: tuple(tensor.shape) for key, tensor in megatron.items()} == plan.megatron_shapes
    for block in plan.blocks:
        found = megatron[block.key][block.lead][block.megatron_row : block.megatron_row + block.rows]
        stored = hf[block.hf].mT if block.hf in plan.transposed else hf[block.hf]
        rows = stored.reshape(-1, *plan.columns(block.key, block.lead))
        assert torch.equal(found, rows[block.hf_row :: block.hf_step][: block.rows]), block


def load_with_torch(folder: Path) -> Tensors:
    state = {
        key: torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        for key, stored in read_metadata(folder).tensors.items()
    }
    distributed_checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_extra_states_are_those_of_transformer_engine(family: str, megatron_checkpoint: Checkpoints) -> None:
    found = read_metadata(megatron_checkpoint(family)).objects
    modules = {"self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}
    if family == "qwen3":
        modules |= {"self_attention.q_layernorm", "self_attention.k_layernorm"}
    layers = {f"decoder.layers.{m}._extra_state/shard_{layer}_4" for m in modules for layer in range(4)}
    assert set(found) == layers | {"decoder.final_layernorm._extra_state/shard_0_1"}
    assert len(set(found.values())) == 1
