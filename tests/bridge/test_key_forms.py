"""One model under each of the names that Megatron may give its tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import copy_checkpoint

from bridge.exporter import export_checkpoint
from bridge.key_forms import as_stored
from bridge.ledger import compare_ledgers, ledger
from bridge.mapping import Block, WeightPlan
from bridge.torch_dist.metadata import Chunk, StoredTensor, TorchDistMetadata, read_metadata, write_metadata

Checkpoints = Callable[..., Path]
LAYERS = "decoder.layers."


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
