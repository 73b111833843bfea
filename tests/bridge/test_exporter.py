import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import copy_checkpoint, edit_json
from safetensors import safe_open

from bridge.errors import CheckpointError, CoverageError
from bridge.exporter import export_checkpoint
from bridge.hf_checkpoint import INDEX, HfCheckpoint
from bridge.ledger import compare_ledgers, ledger
from bridge.mapping import DirectMapping, Piece
from bridge.megatron_checkpoint import HF_FOLDER, MODEL
from bridge.provider import GPTModelProvider
from bridge.torch_dist.metadata import METADATA, TorchDistMetadata, read_metadata, write_metadata

Checkpoints = Callable[..., Path]


@pytest.mark.parametrize("buffer_size", [40, 1000, 256 * 1024])
def test_exports_what_training_saved(
    buffer_size: int,
    training_run: Path,
    hf_checkpoint: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Columns and rows cut by TP=2, a padded vocabulary, optimizer state and objects beside the model."""
    monkeypatch.setattr("bridge.hf_view.BUFFER_SIZE", buffer_size)
    exported = export_checkpoint(training_run, tmp_path / "hf")
    comparison = compare_ledgers(ledger(hf_checkpoint("qwen2")), ledger(exported.path))
    assert comparison.passed
    assert len(comparison.rows) == exported.tensors


def test_ranges_of_few_rows_meet_every_cut(
    training_run: Path, hf_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.exporter.MAX_RANGE_SIZE", 700)
    export_checkpoint(training_run, tmp_path / "hf", max_shard_size="50KB", workers=3)
    assert compare_ledgers(ledger(hf_checkpoint("qwen2")), ledger(tmp_path / "hf")).passed


def test_shards_go_by_layer_and_size(megatron_checkpoint: Checkpoints, tmp_path: Path) -> None:
    export_checkpoint(megatron_checkpoint("llama"), tmp_path / "hf", max_shard_size="100KB")
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = HfCheckpoint.open(tmp_path / "hf").tensors
    for shard in shards:
        assert sum(t.nbytes for t in tensors.values() if t.file == shard) <= 100_000
        with safe_open(shard, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    first = [name for name, t in tensors.items() if t.file == shards[0]]
    assert "model.embed_tokens.weight" in first
    assert "model.layers.0.input_layernorm.weight" in first


def test_a_config_can_come_from_elsewhere(
    megatron_checkpoint: Checkpoints, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """A checkpoint of plain Megatron has no model.json."""
    bare = copy_checkpoint(megatron_checkpoint("llama"), tmp_path / "bare")
    (bare / MODEL).unlink()
    shutil.rmtree(bare / HF_FOLDER)
    with pytest.raises(CheckpointError, match=r"has no model\.json"):
        export_checkpoint(bare, tmp_path / "hf")
    export_checkpoint(bare, tmp_path / "hf", config_from=hf_checkpoint("llama"))
    assert compare_ledgers(ledger(hf_checkpoint("llama")), ledger(tmp_path / "hf")).passed
    assert (tmp_path / "hf" / "generation_config.json").is_file()


def edit_metadata(folder: Path, edit: Callable[[TorchDistMetadata], object]) -> None:
    metadata = read_metadata(folder)
    edit(metadata)
    write_metadata(folder, metadata)


def drop_chunk(metadata: TorchDistMetadata) -> None:
    metadata.tensors[FC1].chunks.pop(3)


def repeat_chunk(metadata: TorchDistMetadata) -> None:
    chunks = metadata.tensors[FC1].chunks
    chunks[1] = chunks[1]._replace(offsets=chunks[0].offsets)
    chunks[0] = chunks[0]._replace(offsets=(0, 1, 0))


def move_chunk(metadata: TorchDistMetadata) -> None:
    chunks = metadata.tensors[FC1].chunks
    chunks[0] = chunks[0]._replace(offsets=(0, 200, 0))


def set_file(name: str) -> Callable[[TorchDistMetadata], None]:
    def edit(metadata: TorchDistMetadata) -> None:
        chunks = metadata.tensors[FC1].chunks
        chunks[0] = chunks[0]._replace(place=chunks[0].place._replace(file=name))

    return edit


def set_place(**values: int) -> Callable[[TorchDistMetadata], None]:
    def edit(metadata: TorchDistMetadata) -> None:
        chunks = metadata.tensors[FC1].chunks
        chunks[0] = chunks[0]._replace(place=chunks[0].place._replace(**values))

    return edit


def drop_axis(metadata: TorchDistMetadata) -> None:
    chunks = metadata.tensors[FC1].chunks
    chunks[0] = chunks[0]._replace(sizes=chunks[0].sizes[1:])


def set_stored(key: str, **values: object) -> Callable[[TorchDistMetadata], None]:
    return lambda metadata: metadata.tensors[key].__dict__.update(values)


FC1 = "decoder.layers.mlp.linear_fc1.weight"
FINAL = "decoder.final_layernorm.weight"
BAD_METADATA: dict[str, tuple[Callable[[TorchDistMetadata], object], type[Exception], str]] = {
    "tensor missing": (lambda m: m.tensors.pop(FINAL), CoverageError, f"lacks '{FINAL}'"),
    "tensor left over": (
        lambda m: m.tensors.update({"decoder.layers.self_attention.q_layernorm.weight": m.tensors[FINAL]}),
        CoverageError,
        "q_layernorm.weight'",
    ),
    "tensor of nobody": (lambda m: m.tensors.update(stray=m.tensors[FINAL]), CoverageError, "'stray'"),
    "other shape": (set_stored(FINAL, shape=(65,)), CoverageError, "has shape \\[65\\]"),
    "fewer rows than the vocabulary": (
        set_stored("embedding.word_embeddings.weight", shape=(159, 64)),
        CoverageError,
        "has 159 rows for a vocabulary of 160",
    ),
    "other dtype": (
        set_stored(FINAL, dtype="float32"),
        CheckpointError,
        "in bfloat16, .metadata says float32",
    ),
    "integers": (set_stored(FINAL, dtype="int32"), CoverageError, "dtype int32"),
    "chunk missing": (drop_chunk, CheckpointError, "chunks of .*linear_fc1"),
    "chunks overlap": (repeat_chunk, CheckpointError, "overlap or leave a gap"),
    "chunk of fewer axes": (drop_axis, CheckpointError, "is malformed: .* is no size of 3 axes"),
    "chunk outside": (move_chunk, CheckpointError, "does not fit"),
    "file outside its folder": (set_file("../x.distcp"), CheckpointError, "only files of its own folder"),
    "file missing": (set_file("ghost.distcp"), CheckpointError, "does not exist"),
    "item of another tensor": (set_place(start=0), CheckpointError, "damaged|has shape"),
    "item beyond the end": (set_place(start=1 << 40), CheckpointError, "damaged"),
    "item before the start": (set_place(start=-5), CheckpointError, "is malformed: .* from -5 on"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_refuses_a_checkpoint(case: str, megatron_checkpoint: Checkpoints, tmp_path: Path) -> None:
    edit, error, message = BAD_METADATA[case]
    source = copy_checkpoint(megatron_checkpoint("llama"), tmp_path / "megatron")
    edit_metadata(source, edit)
    with pytest.raises(error, match=message) as caught:
        export_checkpoint(source, tmp_path / "hf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_refuses_a_truncated_file(megatron_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = copy_checkpoint(megatron_checkpoint("llama"), tmp_path / "megatron")
    file = source / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        export_checkpoint(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_refuses_another_models_description(megatron_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = copy_checkpoint(megatron_checkpoint("llama"), tmp_path / "megatron")
    edit_json(source / MODEL, num_layers=3)
    with pytest.raises(CoverageError, match="has shape \\[4, 64\\], its model says \\[3, 64\\]"):
        export_checkpoint(source, tmp_path / "hf")


def test_names_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        export_checkpoint(tmp_path / "ghost", tmp_path / "hf")
    with pytest.raises(CheckpointError, match=f"neither {METADATA}"):
        export_checkpoint(tmp_path, tmp_path / "hf")


def test_rules_that_do_not_map_all_rows_are_refused(
    megatron_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a family from outside the tree may have them."""
    right = DirectMapping.pieces

    def without_a_row(self: DirectMapping, provider: GPTModelProvider) -> list[Piece]:
        return [piece._replace(rows=piece.rows - 1) for piece in right(self, provider)]

    monkeypatch.setattr(DirectMapping, "pieces", without_a_row)
    with pytest.raises(CoverageError, match=r"rules map \d+ of the \d+ rows of 'model\."):
        export_checkpoint(megatron_checkpoint("llama"), tmp_path / "hf")
