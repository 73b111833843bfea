"""One model under each of the names that Megatron may give its tensors."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import copy_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from bridge import distributed, restricted_load
from bridge.auto_bridge import AutoBridge
from bridge.errors import CheckpointError
from bridge.exporter import export_checkpoint
from bridge.key_forms import as_stored
from bridge.ledger import compare_ledgers, ledger
from bridge.live_checkpoint import load_checkpoint
from bridge.mapping import Block, WeightPlan
from bridge.torch_dist.metadata import Chunk, StoredTensor, TorchDistMetadata, read_metadata, write_metadata

Checkpoints = Callable[..., Path]
Chunks = list[torch.nn.Module]
LAYERS = "decoder.layers."


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


def by_layer(metadata: TorchDistMetadata) -> None:
    """Name tensors as `non_homogeneous_layers` does, over the same items."""
    for key in [key for key in metadata.tensors if key.startswith(LAYERS)]:
        tensor = metadata.tensors.pop(key)
        for chunk in tensor.chunks:
            name = f"{LAYERS}{chunk.offsets[0]}.{key.removeprefix(LAYERS)}"
            stored = metadata.tensors.setdefault(name, StoredTensor(tensor.dtype, tensor.shape[1:]))
            stored.chunks.append(Chunk(chunk.offsets[1:], chunk.sizes[1:], chunk.place))


def test_layers_may_be_numbers_in_the_key(
    hf_checkpoint: Checkpoints,
    megatron_checkpoint: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The items' own shapes keep the layer's axis, of one: only their bytes matter here.
    monkeypatch.setattr("bridge.torch_dist.items._check_contiguous", lambda *arguments: None)
    source = copy_checkpoint(megatron_checkpoint("qwen3"), tmp_path / "megatron")
    metadata = read_metadata(source)
    by_layer(metadata)
    write_metadata(source, metadata)
    export_checkpoint(source, tmp_path / "hf")
    assert compare_ledgers(ledger(hf_checkpoint("qwen3")), ledger(tmp_path / "hf")).passed


FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
PLAN = WeightPlan(
    blocks=[
        Block("gate_up", expert * 8 + step, 4, FC1, (1, expert), step * 4, 2)
        for expert in (0, 1)
        for step in (0, 1)
    ],
    hf_shapes={"gate_up": (2, 8, 3)},
    megatron_shapes={FC1: (2, 2, 8, 3)},
)


def test_experts_and_halves_may_have_keys_of_their_own() -> None:
    names = [f"decoder.layers.1.mlp.experts.experts.{expert}.linear_fc1.weight" for expert in (0, 1)]
    plan = as_stored(PLAN, {f"{name}{half}" for name in names for half in ("_w", "_v")})
    assert plan.megatron_shapes == dict.fromkeys(
        [f"{n}{half}" for n in names for half in ("_w", "_v")], (4, 3)
    )
    assert plan.blocks == [
        Block("gate_up", 0, 4, f"{names[0]}_w", (), 0, 2),
        Block("gate_up", 1, 4, f"{names[0]}_v", (), 0, 2),
        Block("gate_up", 8, 4, f"{names[1]}_w", (), 0, 2),
        Block("gate_up", 9, 4, f"{names[1]}_v", (), 0, 2),
    ]


def test_a_block_over_both_halves_is_cut() -> None:
    key = "decoder.layers.mlp.linear_fc1.weight"
    plan = WeightPlan([Block("w", 0, 8, key, (2,), 0)], {"w": (8, 3)}, {key: (3, 8, 3)})
    halves = as_stored(plan, {f"decoder.layers.2.mlp.linear_fc1.weight{half}" for half in ("_w", "_v")})
    assert [(b.hf_row, b.rows, b.key[-2:], b.megatron_row) for b in halves.blocks] == [
        (0, 4, "_w", 0),
        (4, 4, "_v", 0),
    ]


def test_numbers_in_the_plan_may_be_an_axis_of_the_checkpoint() -> None:
    keys = [f"{LAYERS}{layer}.mlp.linear_fc2.weight" for layer in (0, 1)]
    plan = WeightPlan(
        [Block(f"w{n}", 0, 4, key, (), 0) for n, key in enumerate(keys)],
        {"w0": (4, 3), "w1": (4, 3)},
        dict.fromkeys(keys, (4, 3)),
    )
    stored = as_stored(plan, {"decoder.layers.mlp.linear_fc2.weight"})
    assert stored.megatron_shapes == {"decoder.layers.mlp.linear_fc2.weight": (2, 4, 3)}
    assert [block.lead for block in stored.blocks] == [(0,), (1,)]


def saved(chunks: Chunks, folder: Path, **metadata: bool) -> Path:
    """Save a model as Megatron does with these settings of its sharded state dict."""
    (model,) = unwrap_model(chunks)
    state = restricted_load.without_extra_state(model.sharded_state_dict(metadata={**metadata}))
    folder.mkdir()
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    return folder


@pytest.mark.parametrize("form", ["non_homogeneous_layers", "singleton_local_shards"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("deepseek_v3", {"num_nextn_predict_layers": 1})],
)
def test_a_live_model_is_loaded_and_exported_from_every_form(
    family: str, settings: dict, form: str, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """DeepSeek-V3 has layers that differ, experts, and prediction layers behind them."""
    source = hf_checkpoint(family, **settings)
    chunks = AutoBridge.from_hf_pretrained(source).to_megatron_model(wrap_with_ddp=False)
    folder = saved(chunks, tmp_path / "megatron", **{form: True})
    numbered = "_w" if form == "singleton_local_shards" else f"{LAYERS}0."
    assert any(numbered in key for key in read_metadata(folder).tensors)
    expected = {name: weight.clone() for name, weight in chunks[0].named_parameters()}
    for weight in chunks[0].parameters():
        weight.data.fill_(7.0)
    load_checkpoint(chunks, folder)
    assert all(torch.equal(weight, expected[name]) for name, weight in chunks[0].named_parameters())
    export_checkpoint(folder, tmp_path / "hf", config_from=source)
    assert compare_ledgers(ledger(source), ledger(tmp_path / "hf")).passed


def test_a_live_model_misses_a_layer_under_its_number(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    chunks = AutoBridge.from_hf_pretrained(hf_checkpoint("llama")).to_megatron_model(wrap_with_ddp=False)
    folder = saved(chunks, tmp_path / "megatron", non_homogeneous_layers=True)
    metadata = read_metadata(folder)
    del metadata.tensors[f"{LAYERS}2.mlp.linear_fc2.weight"]
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointError, match=r"has no 'decoder\.layers\.mlp\.linear_fc2\.weight'"):
        load_checkpoint(chunks, folder)
