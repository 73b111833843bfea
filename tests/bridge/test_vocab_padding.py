"""Rows behind the vocabulary: recorded, taken off, and never mistaken for tokens, or tokens for them."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from checkpoints import copy_checkpoint, edit_json
from plain_checkpoints import ROPE, make_plain_run, save_arguments

from bridge import AutoBridge, distributed
from bridge.errors import CheckpointError, ConfigError, CoverageError, InputError
from bridge.exporter import export_checkpoint
from bridge.ledger import compare_ledgers, ledger
from bridge.live_checkpoint import load_checkpoint
from bridge.live_vocabulary import check_same_vocabulary
from bridge.live_weights import export_hf_weights
from bridge.megatron_checkpoint import MODEL, read_model
from bridge.vocab_padding import VocabPadding

Checkpoints = Callable[..., Path]
WRONG = (100, 128, 200)  # for the 160 tokens of the tests' models


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


def claim(folder: Path, vocab_size: int, **changes: Any) -> Path:
    """Let a Megatron checkpoint say of itself that its model has another vocabulary."""
    description = json.loads((folder / MODEL).read_text())
    hf_config = {**description["hf_config"], "vocab_size": vocab_size}
    edit_json(folder / MODEL, vocab_size=vocab_size, hf_config=hf_config, **changes)
    return folder


@pytest.mark.parametrize(
    ("rows", "explained"),
    [(160, True), (256, True), (512, True), (161, False), (384, False), (159, False), (1 << 20, False)],
)
def test_without_a_record_only_usual_paddings_are_some(rows: int, explained: bool) -> None:
    assert VocabPadding().explains(rows, 160) is explained


def test_another_vocabulary_of_the_same_family_is_no_padding() -> None:
    """Llama 3 has 256 tokens behind the 128000 of its text."""
    assert not VocabPadding().explains(128256, 128000)


@pytest.mark.parametrize("vocab_size", WRONG)
@pytest.mark.parametrize("record", [{}, {"num_padding_rows": None}], ids=["recorded", "not recorded"])
def test_a_wrong_vocabulary_is_not_exported(
    record: dict[str, Any], vocab_size: int, megatron_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = copy_checkpoint(megatron_checkpoint("llama"), tmp_path / "megatron")
    claim(folder, vocab_size, **record)
    with pytest.raises(CoverageError, match=rf"has 160 rows for a vocabulary of {vocab_size}"):
        export_checkpoint(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("vocab_size", WRONG)
def test_a_wrong_vocabulary_is_not_loaded(
    vocab_size: int, megatron_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = claim(copy_checkpoint(megatron_checkpoint("llama"), tmp_path / "megatron"), vocab_size)
    bridge = AutoBridge.from_hf_config(read_model(folder).hf_config)
    with pytest.raises(CoverageError, match=f"for a vocabulary of {vocab_size}"):
        bridge.load_megatron_model(folder, wrap_with_ddp=False)


@pytest.mark.parametrize("vocab_size", [129, 200])
def test_a_model_of_another_vocabulary_is_neither_filled_nor_exported(
    vocab_size: int, hf_checkpoint: Checkpoints, megatron_checkpoint: Checkpoints
) -> None:
    """All of them have 256 rows in memory: the rows alone do not tell."""
    folder = megatron_checkpoint("llama")
    provider = read_model(folder)
    provider.vocab_size = vocab_size
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    for source in (folder, hf_checkpoint("llama")):
        with pytest.raises(CoverageError, match=rf"vocabulary of {vocab_size} tokens, .*llama.* one of 160"):
            load_checkpoint(model, source)
    with pytest.raises(CoverageError, match=rf"vocabulary of {vocab_size} tokens, the config to export"):
        list(export_hf_weights(model, read_model(folder)))
    with pytest.raises(CoverageError, match=rf"vocabulary of {vocab_size} tokens, the config to save"):
        AutoBridge.from_hf_pretrained(hf_checkpoint("llama")).save_megatron_model(model, folder / "never")


@pytest.mark.parametrize(("rows", "passes"), [(256, True), (160, True), (200, False)])
def test_a_model_that_says_nothing_needs_a_usual_padding(rows: int, passes: bool) -> None:
    """One that Megatron alone has built."""
    with nullcontext() if passes else pytest.raises(CoverageError, match="embedding has 200 rows for"):
        check_same_vocabulary(None, rows, 160, "the folder")


def test_the_padding_of_a_run_is_recorded_and_taken_off(
    training_run: Path, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = training_run / "iter_0000005"
    assert json.loads((folder / MODEL).read_text())["num_padding_rows"] == 96
    with pytest.raises(CoverageError, match="256 rows for a vocabulary of 130 and 96 recorded as padding"):
        export_checkpoint(claim(copy_checkpoint(folder, tmp_path / "megatron"), 130), tmp_path / "hf")
    export_checkpoint(training_run, tmp_path / "hf")
    assert compare_ledgers(ledger(hf_checkpoint("qwen2")), ledger(tmp_path / "hf")).passed


@pytest.fixture
def plain(hf_checkpoint: Checkpoints, megatron_checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A run of plain Megatron-LM with 96 rows behind its 160 tokens."""
    run = make_plain_run(megatron_checkpoint("llama", vocab_size=256, **ROPE), tmp_path / "run")
    save_arguments(run / "iter_0000010", make_vocab_size_divisible_by=128, padded_vocab_size=256)
    return run


def test_padding_of_plain_megatron_is_taken_off(
    plain: Path, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    padded = ledger(hf_checkpoint("llama", vocab_size=256, **ROPE)).records
    described = hf_checkpoint("llama", **ROPE)
    for name, options in {"config": {"config_from": described}, "family": {"family": "llama"}}.items():
        export_checkpoint(plain, tmp_path / name, **options)
        records = ledger(tmp_path / name).records
        different = {a.name for a, b in zip(records, padded, strict=True) if a.content != b.content}
        assert different == {"lm_head.weight", "model.embed_tokens.weight"}
        assert all(each.shape == (160, 64) for each in records if each.name in different)


@pytest.mark.parametrize("vocab_size", [130, 162, 255])
def test_tokens_of_plain_megatron_are_no_padding(
    vocab_size: int, plain: Path, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    described = hf_checkpoint("llama", vocab_size=vocab_size, **ROPE)
    with pytest.raises(ConfigError, match=f"vocab_size is {vocab_size}, trained was 256 with its padding"):
        export_checkpoint(plain, tmp_path / "hf", config_from=described)


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (100_000, "vocab_size is 160, trained was 100000 with its padding"),
        (512, "has 256 rows for a vocabulary of 160, its arguments say 512"),
    ],
)
def test_arguments_that_contradict_the_rows_are_refused(
    total: int, message: str, plain: Path, tmp_path: Path
) -> None:
    save_arguments(plain / "iter_0000010", padded_vocab_size=total)
    with pytest.raises(InputError, match=message):
        export_checkpoint(plain, tmp_path / "hf", family="llama")


@pytest.mark.parametrize("record", [-1, 96.0, True, "96"])
def test_a_record_that_is_no_number_of_rows_is_refused(
    record: object, megatron_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = copy_checkpoint(megatron_checkpoint("llama"), tmp_path / "megatron")
    edit_json(folder / MODEL, num_padding_rows=record)
    with pytest.raises(CheckpointError, match=r"model\.json is malformed: num_padding_rows is"):
        export_checkpoint(folder, tmp_path / "hf")
