from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import copy_checkpoint, edit_json

from bridge.errors import BridgeworksError, CheckpointError
from bridge.megatron_checkpoint import (
    HF_FOLDER,
    LATEST,
    MODEL,
    MegatronCheckpoint,
    copy_model,
    is_megatron_checkpoint,
    read_model,
    resolve_checkpoint,
)

Checkpoints = Callable[..., Path]


def test_opens_an_imported_checkpoint(megatron_checkpoint: Checkpoints) -> None:
    checkpoint = MegatronCheckpoint.open(megatron_checkpoint("llama"))
    assert checkpoint.provider.hf_model_type == "llama"
    assert set(checkpoint.metadata.tensors) == set(checkpoint.plan().megatron_shapes)
    assert [path.name for path in checkpoint.side_files] == ["generation_config.json"]


def test_a_training_run_is_its_latest_checkpoint(training_run: Path) -> None:
    checkpoint = MegatronCheckpoint.open(training_run)
    assert checkpoint.path == training_run / "iter_0000005"
    assert not any(key.startswith("optimizer") for key in checkpoint.metadata.tensors)


def test_a_description_is_taken_over(megatron_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = megatron_checkpoint("llama")
    copy_model(source, tmp_path, num_padding_rows=0)
    assert read_model(tmp_path) == read_model(source)
    names = {path.name for path in (tmp_path / HF_FOLDER).iterdir()}
    assert names == {"config.json", "generation_config.json"}


@pytest.mark.parametrize("latest", ["7", "../5", "release", "", "5\n6", "٥", b"\xff"])
def test_refuses_a_latest_that_is_not_there(latest: str | bytes, training_run: Path, tmp_path: Path) -> None:
    (tmp_path / LATEST).write_bytes(latest.encode() if isinstance(latest, str) else latest)
    (tmp_path / "iter_0000005").symlink_to(training_run / "iter_0000005")
    assert is_megatron_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="holds no such checkpoint"):
        resolve_checkpoint(tmp_path)


def test_refuses_the_older_formats_of_megatron_lm(tmp_path: Path) -> None:
    (tmp_path / LATEST).write_text("5")
    (tmp_path / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"iter_0000005 has no \.metadata.*--ckpt-format torch_dist"):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"surprise": 1}',
        '{"num_layers": "four"}',
        "{}",
        '{"rope_parameters": "x"}',
        '{"window_size": 1}',
    ],
)
def test_refuses_a_malformed_description(
    content: str, megatron_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = copy_checkpoint(megatron_checkpoint("llama"), tmp_path / "megatron")
    (source / MODEL).write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.json (is malformed|is not|holds no)"):
        MegatronCheckpoint.open(source)


def test_refuses_an_unknown_family(megatron_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = copy_checkpoint(megatron_checkpoint("llama"), tmp_path / "megatron")
    edit_json(source / MODEL, hf_model_type="gpt9")
    with pytest.raises(BridgeworksError, match="unknown model_type 'gpt9'"):
        MegatronCheckpoint.open(source).plan()
