"""The logits gate on real checkpoints: it passes what is right and fails on every mutation."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import copy_checkpoint, edit_json
from process_groups import run_ranks
from safetensors.torch import load_file, save_file

from bridge import compare_logits, distributed
from bridge.errors import ConfigError, GateError
from bridge.families import families
from bridge.importer import import_checkpoint

Weights = dict[str, torch.Tensor]
LAYER = "model.layers.2"
FAULTY = 3  # layers are counted from 1 where a person reads it


def permute_heads(weights: Weights) -> None:
    name = f"{LAYER}.self_attn.q_proj.weight"
    weights[name] = weights[name].unflatten(0, (8, 16)).roll(1, dims=0).flatten(0, 1).contiguous()


def swap_gate_and_up(weights: Weights) -> None:
    gate, up = f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"
    weights[gate], weights[up] = weights[up], weights[gate]


def swap_norms(weights: Weights) -> None:
    first, second = f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"
    weights[first], weights[second] = weights[second], weights[first]


def zero_keys(weights: Weights) -> None:
    weights[f"{LAYER}.self_attn.k_proj.weight"].zero_()


def spoil_one_value(weights: Weights) -> None:
    weights["model.norm.weight"][0] = float("nan")


def mutated_weights(source: Path, folder: Path, mutate: Callable[[Weights], None]) -> Path:
    copy_checkpoint(source, folder)
    shards = {file: load_file(file) for file in folder.glob("*.safetensors")}
    weights = {name: weight for shard in shards.values() for name, weight in shard.items()}
    mutate(weights)
    for file, shard in shards.items():
        save_file({name: weights[name] for name in shard}, file, metadata={"format": "pt"})
    return folder


def mutated_rope(source: Path, folder: Path, **changes: Any) -> Path:
    copy_checkpoint(source, folder)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    rope = {key: value for key, value in {**rope, **changes}.items() if value is not None}
    edit_json(folder / "config.json", rope_parameters=rope)
    return folder


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


@pytest.fixture(scope="module")
def llama(hf_checkpoint: Callable[..., Path]) -> Path:
    # At the usual 0.02 attention is nearly a plain mean over positions, and hides faults in it.
    return hf_checkpoint("llama", initializer_range=0.1)


def compare(a: Path, b: Path, dtype: str = "float32", **settings: Any) -> dict[str, Any]:
    return compare_logits.main({"a": str(a), "b": str(b), "dtype": dtype, "num_prompts": 2, **settings})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_passes(llama: Path, dtype: str, tmp_path: Path) -> None:
    import_checkpoint(llama, tmp_path / "megatron")
    table = tmp_path / "table.jsonl"
    report = compare(llama, tmp_path / "megatron", dtype, table=str(table))
    assert report["gate"]["passed"], report["gate"]
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(rows) == report["num_positions"] == 2 * 64
    assert max(row["max_abs"] for row in rows) == report["gate"]["metrics"]["max_abs"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mutate", [permute_heads, swap_gate_and_up, swap_norms, zero_keys, spoil_one_value])
def test_mutated_weights_fail(
    mutate: Callable[[Weights], None], dtype: str, llama: Path, tmp_path: Path
) -> None:
    import_checkpoint(mutated_weights(llama, tmp_path / "hf", mutate), tmp_path / "megatron")
    report = compare(llama, tmp_path / "megatron", dtype)
    assert not report["gate"]["passed"], report["gate"]
    assert report["gate"]["failures"]
    if mutate is not spoil_one_value:  # which is behind the last layer
        assert report["hidden_states"]["parts_at"] == FAULTY, report["hidden_states"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10000.0},
        {
            "rope_type": "default",
            "factor": None,
            "low_freq_factor": None,
            "high_freq_factor": None,
            "original_max_position_embeddings": None,
        },
        {"factor": 8.0},
    ],
    ids=["wrong base", "dropped scaling", "wrong factor"],
)
def test_wrong_rotary_embedding_fails(
    changes: dict[str, Any], dtype: str, llama: Path, tmp_path: Path
) -> None:
    import_checkpoint(mutated_rope(llama, tmp_path / "hf", **changes), tmp_path / "megatron")
    report = compare(llama, tmp_path / "megatron", dtype)
    assert not report["gate"]["passed"], report["gate"]


def test_ends_of_different_shape_are_not_measured(llama: Path, hf_checkpoint: Callable[..., Path]) -> None:
    report = compare(llama, hf_checkpoint("llama", num_hidden_layers=2))
    assert not report["gate"]["passed"]
    assert report["gate"]["failures"] == [
        "not measured: num_layers is 4 at one end and 2 at the other",
    ]


def test_transformers_complains_of_a_tensor_that_is_not_there(llama: Path, tmp_path: Path) -> None:
    name = f"{LAYER}.self_attn.k_proj.weight"
    report = compare(llama, without_tensor(llama, tmp_path / "hf", name))
    assert report["reload"]["failures"] == [f"{tmp_path / 'hf'}: transformers finds missing_keys: {name}"]


def without_tensor(source: Path, folder: Path, name: str) -> Path:
    copy_checkpoint(source, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"].pop(name)
    save_file({n: w for n, w in load_file(shard).items() if n != name}, shard, metadata={"format": "pt"})
    edit_json(folder / "model.safetensors.index.json", weight_map=index["weight_map"])
    return folder


def test_stages_together_find_the_layer_where_two_megatron_ends_part(llama: Path, tmp_path: Path) -> None:
    """The faulty layer is on the second stage of two; prompts come from a file."""
    import_checkpoint(llama, tmp_path / "megatron")
    import_checkpoint(mutated_weights(llama, tmp_path / "hf", zero_keys), tmp_path / "mutated")
    (tmp_path / "prompts.json").write_text(json.dumps([[5, 6, 7], [9, 8, 7, 6, 5]]))
    config = {
        "a": str(tmp_path / "megatron"),
        "b": str(tmp_path / "mutated"),
        "dtype": "float32",
        "prompts_file": str(tmp_path / "prompts.json"),
        "pipeline_model_parallel_size": 2,
        "layers_table": str(tmp_path / "layers.jsonl"),
        "scratch": str(tmp_path),
    }
    report = run_ranks(2, "bridge.compare_logits", config, tmp_path / "job")
    assert report["num_positions"] == 8
    assert report["hidden_states"]["parts_at"] == FAULTY
    assert report["hidden_states"]["by_layer"][:FAULTY] == [0.0] * FAULTY
    assert not report["gate"]["passed"]
    rows = [json.loads(line) for line in (tmp_path / "layers.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["layer"]) for row in rows] == [(p, n) for p in (0, 1) for n in range(5)]
    assert not list(tmp_path.glob("bridgeworks-trace-*"))


def test_experts_on_two_ranks_say_what_transformers_says(
    hf_checkpoint: Callable[..., Path], megatron_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """With tensor parallelism sequences are cut: a prompt of odd length has to be filled up."""
    config = {
        "a": str(hf_checkpoint("qwen3_moe")),
        "b": str(megatron_checkpoint("qwen3_moe")),
        "dtype": "float32",
        "prompts": [[5, 6, 7], [9, 8, 7, 6, 5]],
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
    }
    report = run_ranks(2, "bridge.compare_logits", config, tmp_path / "job")
    assert report["gate"]["passed"], report
    assert report["hidden_states"]["passed"], report
    assert report["num_positions"] == 8


@pytest.mark.parametrize("family", families())
def test_every_family_agrees_at_each_layer(
    family: str, hf_checkpoint: Callable[..., Path], megatron_checkpoint: Callable[..., Path]
) -> None:
    report = compare(hf_checkpoint(family), megatron_checkpoint(family))
    assert report["gate"]["passed"], report["gate"]
    assert report["hidden_states"]["passed"], report["hidden_states"]
    assert report["reload"]["passed"], report["reload"]
    assert len(report["hidden_states"]["by_layer"]) == report["hidden_states"]["num_layers"] + 1 > 2


def quantised(source: Path, folder: Path, block: int = 16) -> Path:
    """Store the projections as Qwen3-FP8 does, in blocks with a scale each."""
    copy_checkpoint(source, folder)
    for file in folder.glob("*.safetensors"):
        stored: Weights = {}
        for name, weight in load_file(file).items():
            if name.endswith("_proj.weight"):
                blocks = weight.float().unflatten(1, (-1, block)).unflatten(0, (-1, block))
                scales = blocks.abs().amax((1, 3), keepdim=True) / 448
                stored[name] = (blocks / scales).reshape(weight.shape).to(torch.float8_e4m3fn)
                stored[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous()
            else:
                stored[name] = weight
        save_file(stored, file, metadata={"format": "pt"})
    index = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    edit_json(folder / "model.safetensors.index.json", weight_map=index)
    settings = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    edit_json(folder / "config.json", quantization_config=settings)
    return folder


def test_a_quantised_end_is_what_transformers_makes_of_it(
    hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    hf = quantised(hf_checkpoint("qwen3"), tmp_path / "hf")
    megatron = import_checkpoint(hf, tmp_path / "megatron").path
    if importlib.util.find_spec("accelerate") is None:  # transformers dequantises with it only
        with pytest.raises(GateError, match="requires accelerate"):
            compare(hf, megatron)
        return
    report = compare(hf, megatron)
    assert report["gate"]["passed"], report["gate"]
    assert report["reload"]["passed"], report["reload"]


def test_dtype_without_thresholds_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="allowed are float32, bfloat16"):
        compare(llama, llama, "float16")
