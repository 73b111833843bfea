import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import copy_checkpoint
from safetensors.torch import load_file, save_file

from bridge.errors import CheckpointError
from bridge.exporter import export_checkpoint
from bridge.family_checks import families_with
from bridge.hf_checkpoint import HfCheckpoint
from bridge.ledger import DIFFERENT, EQUAL, ONLY_A, ONLY_B, compare_ledgers, ledger
from bridge.torch_dist.metadata import Chunk, read_metadata

Checkpoints = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("family", families_with("weights"))
def test_both_ends_have_the_same_ledger(
    family: str, hf_checkpoint: Checkpoints, megatron_checkpoint: Checkpoints
) -> None:
    hf, megatron = ledger(hf_checkpoint(family)), ledger(megatron_checkpoint(family))
    comparison = compare_ledgers(hf, megatron)
    assert comparison.passed
    assert comparison.names(EQUAL) == tuple(sorted(HfCheckpoint.open(hf_checkpoint(family)).tensors))


def test_a_training_run_is_read_through_its_cuts(training_run: Path, hf_checkpoint: Checkpoints) -> None:
    assert compare_ledgers(ledger(hf_checkpoint("qwen2")), ledger(training_run)).passed


def test_records_say_what_lies_where(hf_checkpoint: Checkpoints, megatron_checkpoint: Checkpoints) -> None:
    """The first row of a tensor is where its record says; the digest is that of its bytes."""
    hf = {record.name: record for record in ledger(hf_checkpoint("llama")).records}
    megatron = {record.name: record for record in ledger(megatron_checkpoint("llama")).records}
    for name, record in hf.items():
        data = (hf_checkpoint("llama") / record.file).read_bytes()
        tensor = HfCheckpoint.open(hf_checkpoint("llama")).tensors[name]
        content = data[record.offset : record.offset + tensor.nbytes]
        assert record.sha256 == hashlib.sha256(content).hexdigest()
        other = megatron[name]
        found = (megatron_checkpoint("llama") / other.file).read_bytes()[other.offset :][:32]
        assert found == content[:32]


def test_records_say_which_rule_carried_what(
    hf_checkpoint: Checkpoints, megatron_checkpoint: Checkpoints
) -> None:
    comparison = compare_ledgers(ledger(hf_checkpoint("llama")), ledger(megatron_checkpoint("llama")))
    rules = {row.name: row.a.rule for row in comparison.rows if row.a and row.b and row.a.rule == row.b.rule}
    assert set(rules) == {row.name for row in comparison.rows}
    assert rules[Q] == "QKVMapping decoder.layers.self_attention.linear_qkv.weight"
    assert rules[UP] == "GatedMLPMapping decoder.layers.mlp.linear_fc1.weight"


def test_a_tied_tensor_counts_once(hf_checkpoint: Checkpoints) -> None:
    names = [record.name for record in ledger(hf_checkpoint("llama", tie_word_embeddings=True)).records]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def swap(tensors: Tensors, a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()


Q, K = "model.layers.2.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
NORMS = "model.layers.0.input_layernorm.weight", "model.layers.3.post_attention_layernorm.weight"
MUTATIONS: dict[str, tuple[Callable[[Tensors], object], set[str]]] = {
    "heads permuted": (lambda t: t.update({Q: t[Q].reshape(8, 16, 64).flip(0).reshape(128, 64)}), {Q}),
    "gate and up swapped": (lambda t: swap(t, GATE, UP), {GATE, UP}),
    "k_proj zeroed": (lambda t: t[K].zero_(), {K}),
    "two norms swapped": (lambda t: swap(t, *NORMS), set(NORMS)),
    "one bit": (lambda t: t[K].view(torch.int16)[3, 5].bitwise_xor_(1), {K}),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_finds_every_mutation(
    case: str, megatron_checkpoint: Checkpoints, hf_checkpoint: Checkpoints, tmp_path
):
    mutate, expected = MUTATIONS[case]
    changed = copy_checkpoint(hf_checkpoint("llama"), tmp_path / "changed")
    for file in changed.glob("*.safetensors"):
        file.unlink()
    tensors = {n: t for f in hf_checkpoint("llama").glob("*.safetensors") for n, t in load_file(f).items()}
    mutate(tensors)
    save_file(tensors, changed / "model.safetensors")
    comparison = compare_ledgers(ledger(megatron_checkpoint("llama")), ledger(changed))
    assert set(comparison.names(DIFFERENT)) == expected
    assert not comparison.passed


def test_names_what_one_end_lacks(hf_checkpoint: Checkpoints) -> None:
    untied, tied = (ledger(hf_checkpoint("llama", tie_word_embeddings=tied)) for tied in (False, True))
    assert compare_ledgers(untied, tied).names(ONLY_A) == ("lm_head.weight",)
    assert compare_ledgers(tied, untied).names(ONLY_B) == ("lm_head.weight",)
    assert not compare_ledgers(tied, untied).passed


def export(folder: Path) -> None:
    export_checkpoint(folder, folder.parent / "hf")


def export_cast(folder: Path) -> None:
    export_checkpoint(folder, folder.parent / "hf", dtype="float32")


def flip_a_bit(checkpoint: Path, chunk: Chunk) -> Path:
    """Flip one in the middle of a stored chunk; return its file."""
    file = checkpoint / chunk.place.file
    data = bytearray(file.read_bytes())
    data[chunk.place.start + chunk.place.length // 2] ^= 1
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("read", [ledger, export, export_cast])
@pytest.mark.parametrize("cut", ["rows", "columns"])
def test_a_bit_that_flipped_in_a_file_of_training_is_found(
    cut: str, read: Callable[[Path], object], training_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(training_run, tmp_path / "run")
    source = next(run.glob("iter_*"))
    key = "mlp.linear_fc1" if cut == "rows" else "mlp.linear_fc2"
    file = flip_a_bit(source, read_metadata(source).tensors[f"decoder.layers.{key}.weight"].chunks[2])
    with pytest.raises(CheckpointError, match=rf"{file.name}, 'decoder.layers.{key}.weight' .* CRC-32"):
        read(run)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("key", ["mlp.linear_fc2", "self_attention.linear_qkv", "mlp.linear_fc1"])
@pytest.mark.parametrize("read", [ledger, export, export_cast])
def test_a_bit_that_flipped_in_a_file_is_found(
    key: str, read: Callable[[Path], object], megatron_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """By the CRC-32 of its item, whether that holds one tensor or rows of three in turn."""
    source = copy_checkpoint(megatron_checkpoint("llama"), tmp_path / "megatron")
    chunk = read_metadata(source).tensors[f"decoder.layers.{key}.weight"].chunks[2]
    file = flip_a_bit(source, chunk)
    with pytest.raises(
        CheckpointError, match=rf"{file.name}, 'decoder.layers.{key}.weight' at byte \d+: .* CRC-32"
    ):
        read(source)
    assert not (tmp_path / "hf").exists()


def test_refuses_another_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a Hugging Face nor a Megatron"):
        ledger(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(CheckpointError, match="neither"):
        ledger(tmp_path)
