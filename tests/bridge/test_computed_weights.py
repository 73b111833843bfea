"""Weights that are not bytes to copy, both ways: cast, fused, transposed, interleaved, quantised."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import copy_checkpoint, edit_json
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bridge.config_rules import Field, HeadDim, Rope
from bridge.decoder import DECODER_CONFIG, decoder_weights
from bridge.errors import CheckpointError, ConfigError, CoverageError, UnsupportedModelError
from bridge.exporter import export_checkpoint
from bridge.families import families
from bridge.family import Family
from bridge.importer import import_checkpoint
from bridge.ledger import compare_ledgers, ledger
from bridge.mapping import DirectMapping, Mapping, MegatronMappingRegistry, Piece, Shape, resolve
from bridge.provider import GPTModelProvider

Checkpoints = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
EXPERTS = "decoder.layers.*.mlp.experts.experts"


def hf_tensors(folder: Path) -> Tensors:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def write(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """Put other tensors and config values into a checkpoint's folder."""
    for file in folder.glob("model*"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    edit_json(folder / "config.json", **config)
    return folder


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("on", ["import", "export"])
@pytest.mark.parametrize(("source_dtype", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_casts_on_the_way(
    source_dtype: str,
    dtype: str,
    on: str,
    size: int | None,
    hf_checkpoint: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if size:
        monkeypatch.setattr("bridge.hf_view.MAX_PART_SIZE", size)
        monkeypatch.setattr("bridge.item_files.MAX_PART_SIZE", size)
    source = hf_checkpoint("qwen2", dtype=source_dtype)
    import_checkpoint(source, tmp_path / "megatron", dtype=dtype if on == "import" else None)
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf", dtype=dtype if on == "export" else None)
    found = hf_tensors(tmp_path / "hf")
    for name, tensor in hf_tensors(source).items():
        assert torch.equal(found[name], tensor.to(getattr(torch, dtype))), name
        assert found[name].dtype == getattr(torch, dtype)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == dtype


def test_refuses_a_dtype_that_weights_cannot_have(tmp_path: Path) -> None:
    for convert in (import_checkpoint, export_checkpoint):
        with pytest.raises(ConfigError, match="dtype is 'int8': allowed are float32"):
            convert(tmp_path, tmp_path / "out", dtype="int8")


def widen(folder: Path, part: str) -> Tensors:
    """Store the tensors whose names hold `part` in float32, with values that 16 bits cannot hold."""
    tensors = hf_tensors(folder)
    chosen = {name: tensor.float() + 1e-6 for name, tensor in tensors.items() if part in name}
    assert chosen
    write(folder, tensors | chosen)
    return tensors | chosen


@pytest.mark.parametrize("part", ["norm.weight", "k_proj", "experts.", "layers.2.mlp.gate."])
def test_kinds_of_tensors_may_have_dtypes_of_their_own(
    part: str, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """So may a single layer's router where Megatron has a key for each layer."""
    source = copy_checkpoint(hf_checkpoint("qwen3_moe"), tmp_path / "source")
    expected = widen(source, part)
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    found = hf_tensors(tmp_path / "hf")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].double(), tensor.double()), name
        # queries and values are in one Megatron tensor with the keys
        assert found[name].dtype == tensor.dtype or part == "k_proj"


@pytest.mark.parametrize(
    ("family", "odd"),
    [
        ("llama", "model.layers.2.mlp.up_proj.weight"),
        ("llama", "model.layers.0.input_layernorm.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.down_proj.weight"),
    ],
)
def test_one_tensor_in_a_dtype_of_its_own_changes_no_other(
    family: str, odd: str, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = copy_checkpoint(hf_checkpoint(family), tmp_path / "source")
    expected = widen(source, odd)
    with pytest.raises(CoverageError, match=f"'{odd}' is float32, others of its kind are bfloat16"):
        import_checkpoint(source, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    import_checkpoint(source, tmp_path / "megatron", dtype="float32")
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    assert torch.equal(hf_tensors(tmp_path / "hf")[odd], expected[odd])


@dataclass(frozen=True)
class Interleaved(Mapping):
    """Gate in the even rows, up in the odd ones, as gpt-oss has it."""

    hf_param: str
    shape: tuple[str, ...]

    def hf_shapes(self, provider: GPTModelProvider) -> dict[str, Shape]:
        rows, *columns = (resolve(dimension, provider) for dimension in self.shape)
        return {self.hf_param: (2 * rows, *columns)}

    def pieces(self, provider: GPTModelProvider) -> Iterator[Piece]:
        rows = resolve(self.shape[0], provider)
        yield Piece(self.hf_param, 0, rows, 0, 2)
        yield Piece(self.hf_param, 1, rows, rows, 2)


FUSED = Family(
    model_type="fused",
    architecture="FusedForCausalLM",
    covers=(),
    config=(*DECODER_CONFIG, HeadDim(), Rope(), Field("num_local_experts", "num_moe_experts")),
    weights=MegatronMappingRegistry(
        *decoder_weights(),
        Interleaved(
            f"{EXPERTS}.linear_fc1.weight",
            "model.layers.*.mlp.experts.gate_up_proj",
            ("ffn_hidden_size", "hidden_size"),
            experts=True,
            fused=True,
            transposed=True,
        ),
        Interleaved(
            f"{EXPERTS}.linear_fc1.bias",
            "model.layers.*.mlp.experts.gate_up_proj_bias",
            ("ffn_hidden_size",),
            experts=True,
            fused=True,
        ),
        DirectMapping(
            f"{EXPERTS}.linear_fc2.weight",
            "model.layers.*.mlp.experts.down_proj",
            ("hidden_size", "ffn_hidden_size"),
            experts=True,
            fused=True,
        ),
    ),
)
NUM_EXPERTS = 3


@pytest.fixture
def fused(hf_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with experts in fused tensors: interleaved and transposed, and as they are."""
    monkeypatch.setitem(families(), "fused", FUSED)
    source = copy_checkpoint(hf_checkpoint("llama"), tmp_path / "source")
    tensors = hf_tensors(source)
    for layer in range(4):
        experts = f"model.layers.{layer}.mlp.experts"
        tensors[f"{experts}.gate_up_proj"] = torch.randn(NUM_EXPERTS, 64, 256).bfloat16()
        tensors[f"{experts}.gate_up_proj_bias"] = torch.randn(NUM_EXPERTS, 256).bfloat16()
        tensors[f"{experts}.down_proj"] = torch.randn(NUM_EXPERTS, 64, 128).bfloat16()
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return write(
        source, tensors, model_type="fused", num_local_experts=NUM_EXPERTS, rope_parameters=rope,
        architectures=["FusedForCausalLM"], attention_bias=None, mlp_bias=None,
    )  # fmt: skip


@pytest.mark.parametrize("size", [None, 5000])
def test_fused_experts_go_both_ways(
    size: int | None, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size:
        monkeypatch.setattr("bridge.hf_view.MAX_PART_SIZE", size)
        monkeypatch.setattr("bridge.item_files.MAX_PART_SIZE", size)
        monkeypatch.setattr("bridge.exporter.MAX_RANGE_SIZE", 3000)
        monkeypatch.setattr("bridge.chunk_plan.MAX_CHUNK_SIZE", 7000)
    import_checkpoint(fused, tmp_path / "megatron")
    stored = load_megatron(tmp_path / "megatron")
    expected = hf_tensors(fused)
    for layer in range(4):
        experts = f"model.layers.{layer}.mlp.experts"
        gate_up = expected[f"{experts}.gate_up_proj"]
        fc1 = torch.cat([gate_up[..., 0::2], gate_up[..., 1::2]], dim=-1).transpose(1, 2)
        assert torch.equal(stored[f"{EXPERTS}.linear_fc1.weight".replace(".*", "")][layer], fc1)
        bias = expected[f"{experts}.gate_up_proj_bias"]
        fc1_bias = torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=-1)
        assert torch.equal(stored[f"{EXPERTS}.linear_fc1.bias".replace(".*", "")][layer], fc1_bias)
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf", max_shard_size="100KB")
    found = hf_tensors(tmp_path / "hf")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert compare_ledgers(ledger(fused), ledger(tmp_path / "megatron")).passed


def load_megatron(folder: Path) -> Tensors:
    from torch.distributed import checkpoint as distributed_checkpoint

    from bridge.torch_dist.metadata import read_metadata

    state = {
        key: torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        for key, stored in read_metadata(folder).tensors.items()
    }
    distributed_checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state


def test_mxfp4_experts_are_read_as_bfloat16(fused: Path, tmp_path: Path) -> None:
    tensors = hf_tensors(fused)
    expected = dict(tensors)
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        blocks = torch.randint(0, 256, (NUM_EXPERTS, 256, 2, 16), dtype=torch.uint8)
        scales = torch.randint(110, 130, (NUM_EXPERTS, 256, 2), dtype=torch.uint8)
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    write(fused, tensors, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    assert import_checkpoint(fused, tmp_path / "megatron").quantization == "mxfp4"
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    found = hf_tensors(tmp_path / "hf")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert compare_ledgers(ledger(fused), ledger(tmp_path / "hf")).passed
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


FP8 = {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic", "fmt": "e4m3"}


@pytest.fixture
def fp8(hf_checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint as Qwen3-FP8: projections in blocks that do not divide them, the rest in bfloat16."""
    source = copy_checkpoint(hf_checkpoint("qwen3"), tmp_path / "source")
    tensors = hf_tensors(source)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // 48), -(-columns // 48)) / 50
    return write(source, tensors, quantization_config=FP8)


def test_fp8_weights_are_read_as_bfloat16(fp8: Path, tmp_path: Path) -> None:
    tensors = hf_tensors(fp8)
    imported = import_checkpoint(fp8, tmp_path / "megatron")
    assert imported.quantization == "fp8"
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    found = hf_tensors(tmp_path / "hf")
    assert imported.tensors == len(found)
    for name, tensor in found.items():
        expected = tensors[name]
        if expected.dtype == torch.float8_e4m3fn:
            scales = tensors[f"{name}_scale_inv"].repeat_interleave(48, 0).repeat_interleave(48, 1)
            expected = (expected.float() * scales[: expected.shape[0], : expected.shape[1]]).bfloat16()
        assert torch.equal(tensor, expected), name
    assert compare_ledgers(ledger(fp8), ledger(tmp_path / "hf")).passed


def test_a_config_alone_quantises_nothing(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """As in a folder whose weights were dequantised and whose config was kept."""
    source = copy_checkpoint(hf_checkpoint("qwen3"), tmp_path / "source")
    edit_json(source / "config.json", quantization_config=FP8)
    assert import_checkpoint(source, tmp_path / "megatron").quantization is None


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BAD_SCALES: dict[str, tuple[Callable[[Tensors], object], type[Exception], str]] = {
    "missing": (lambda t: t.pop(f"{Q_PROJ}_scale_inv"), CheckpointError, f"without '{Q_PROJ}_scale_inv'"),
    "of too few blocks": (
        lambda t: t.update({f"{Q_PROJ}_scale_inv": torch.ones(2, 2)}),
        CheckpointError,
        "has shape \\[2, 2\\]; blocks of \\[48, 48\\]",
    ),
    "one where blocks are said": (
        lambda t: t.update({f"{Q_PROJ}_scale_inv": torch.ones(1, 1)}),
        CheckpointError,
        r"has shape \[1, 1\]; blocks of \[48, 48\] of \[128, 64\] need \[3, 2\]",
    ),
    "of nothing": (
        lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}),
        CoverageError,
        "holds 'model.norm.weight_scale_inv'",
    ),
    "integers": (
        lambda t: t.update({f"{Q_PROJ}_scale_inv": torch.ones(3, 2, dtype=torch.int32)}),
        CheckpointError,
        "is no block-scaled FP8 weight",
    ),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_refuses_scales(case: str, fp8: Path, tmp_path: Path) -> None:
    edit, error, message = BAD_SCALES[case]
    tensors = hf_tensors(fp8)
    edit(tensors)
    write(fp8, tensors)
    with pytest.raises(error, match=message):
        import_checkpoint(fp8, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantization 'awq': fp8 and mxfp4 can be read"),
        ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({**FP8, "surprise": 1}, "key 'surprise'"),
        ("fp8", "quantization 'fp8'"),
        ({**FP8, "quant_method": ["fp8"]}, r"quantization \['fp8'\]"),
        *(
            ({**FP8, "weight_block_size": size}, r"weight_block_size .*: expected \[an int of 1 or more, an")
            for size in ("x", [128], [0, 128], [128, 128, 128], [1.5, 1.5])
        ),
    ],
)
def test_refuses_other_quantisation(settings: Any, message: str, fp8: Path, tmp_path: Path) -> None:
    edit_json(fp8 / "config.json", quantization_config=settings)
    with pytest.raises(UnsupportedModelError, match=message):
        import_checkpoint(fp8, tmp_path / "megatron")
