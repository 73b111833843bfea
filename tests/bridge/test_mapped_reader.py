"""Checkpoints read through mapped files: damaged ones, and ones whose bytes lie unfavourably."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import copy_checkpoint
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata

from bridge import distributed, restricted_load
from bridge.errors import CheckpointError
from bridge.live_checkpoint import load_checkpoint, load_model_state, model_state, save_checkpoint
from bridge.live_weights import export_hf_weights
from bridge.megatron_checkpoint import read_model

KEY = "decoder.layers.mlp.linear_fc2.weight"
Chunks = list[torch.nn.Module]


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


def through_megatron(chunks: Chunks, folder: Path) -> None:
    load_model_state(chunks, restricted_load.load(model_state(chunks), folder))


def build(folder: Path, **fields: str) -> Chunks:
    provider = read_model(folder)
    for name, value in fields.items():
        setattr(provider, name, value)
    return provider.provide_distributed_model(wrap_with_ddp=False, perform_initialization=False)


def same_as(chunks: Chunks, hf: Path, provider_folder: Path) -> bool:
    found = dict(export_hf_weights(chunks, read_model(provider_folder)))
    wanted = {name: weight for file in hf.glob("*.safetensors") for name, weight in load_file(file).items()}
    return found.keys() == wanted.keys() and all(
        torch.equal(weight, wanted[name].to(weight.dtype)) for name, weight in found.items()
    )


def items_of(metadata: Metadata, key: str) -> list:
    return [item for index, item in metadata.storage_data.items() if index.fqn == key]


def edit(folder: Path, change: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def truncate(folder: Path) -> None:
    def cut(metadata: Metadata) -> None:
        items = items_of(metadata, KEY)
        for item in items:  # in a file of its own
            data = (folder / item.relative_path).read_bytes()[item.offset : item.offset + item.length]
            (folder / "own.distcp").write_bytes(data[:-100])
            item.relative_path, item.offset = "own.distcp", 0

    edit(folder, cut)


def overwrite(folder: Path) -> None:
    def scribble(metadata: Metadata) -> None:
        item = items_of(metadata, KEY)[0]
        with (folder / item.relative_path).open("r+b") as stream:
            stream.seek(item.offset + item.length - 200)
            stream.write(b"?" * 200)

    edit(folder, scribble)


def point_elsewhere(folder: Path) -> None:
    def swap(metadata: Metadata) -> None:
        mine, other = (items_of(metadata, key)[0] for key in (KEY, "decoder.final_layernorm.weight"))
        mine.__dict__.update(other.__dict__)

    edit(folder, swap)


@pytest.mark.parametrize("load", [load_checkpoint, through_megatron])
@pytest.mark.parametrize("damage", [truncate, overwrite, point_elsewhere])
def test_damage_is_named(
    damage: Callable[[Path], None],
    load: Callable[[Chunks, Path], None],
    megatron_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = copy_checkpoint(megatron_checkpoint("qwen3"), tmp_path / "copy")
    damage(folder)
    with pytest.raises(CheckpointError, match=rf"\.distcp, '{KEY}'") as caught:
        load(build(folder), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_checkpoint, through_megatron])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_payloads_may_begin_at_any_byte(
    dtype: str,
    load: Callable[[Chunks, Path], None],
    megatron_checkpoint: Callable[..., Path],
    hf_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = copy_checkpoint(megatron_checkpoint("qwen3"), tmp_path / "copy")
    for file in folder.glob("*.distcp"):
        file.write_bytes(b"?" + file.read_bytes())

    def shift(metadata: Metadata) -> None:
        for item in set(map(id, metadata.storage_data.values())):
            next(i for i in metadata.storage_data.values() if id(i) == item).offset += 1

    edit(folder, shift)
    chunks = build(folder, params_dtype=dtype)
    load(chunks, folder)
    assert same_as(chunks, hf_checkpoint("qwen3"), folder)


def test_a_chunk_that_is_missing_is_noticed(megatron_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_checkpoint(megatron_checkpoint("qwen3"), tmp_path / "copy")

    def drop(metadata: Metadata) -> None:
        chunks = metadata.state_dict_metadata[KEY].chunks
        gone = chunks.pop()
        index = next(i for i in metadata.storage_data if i.fqn == KEY and i.offset == gone.offsets)
        del metadata.storage_data[index]

    edit(folder, drop)
    with pytest.raises(CheckpointError, match=rf"the chunks of '{KEY}' overlap or leave a gap"):
        load_checkpoint(build(folder), folder)


def test_a_tensor_too_many_is_refused(megatron_checkpoint: Callable[..., Path]) -> None:
    folder = megatron_checkpoint("qwen3")
    chunks = build(folder, qk_layernorm=False)
    with pytest.raises(
        CheckpointError, match=r"has '.*k_layernorm\.weight', which the model has no place for"
    ):
        load_checkpoint(chunks, folder)


def test_values_that_overflow_are_refused(hf_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from bridge import AutoBridge
    from bridge.errors import CoverageError

    source = hf_checkpoint("llama", dtype="float32")
    model = AutoBridge.from_hf_pretrained(source).to_megatron_model(wrap_with_ddp=False)
    with torch.no_grad():
        model[0].decoder.final_layernorm.weight[3] = 1e30
    provider = AutoBridge.from_hf_pretrained(source).to_megatron_provider(load_weights=False)
    save_checkpoint(model, provider, tmp_path / "saved")
    half = build(tmp_path / "saved", params_dtype="float16")
    with pytest.raises(CoverageError, match=r"final_layernorm.*overflow in float16"):
        load_checkpoint(half, tmp_path / "saved")
