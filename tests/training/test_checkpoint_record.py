import json
import shutil

import pytest

from bridge.errors import CheckpointError
from training.checkpoint import choose_checkpoint
from training.checkpoint_folders import complete_checkpoints
from training.checkpoint_record import RECORD, check_files, write_record
from training.config import CheckpointConfig, ConfigContainer
from training.resume_checks import RUN_CONFIG, describe_data


@pytest.fixture
def config(tmp_path) -> ConfigContainer:
    return ConfigContainer(checkpoint=CheckpointConfig(save=str(tmp_path / "run")))


@pytest.fixture
def newest(config, tmp_path):
    """The second of two checkpoints of a run."""
    for iteration in (5, 10):
        folder = tmp_path / "run" / f"iter_{iteration:07d}"
        (folder / "hf").mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(b"tensors" * iteration)
        (folder / "hf" / "tokenizer.json").write_text("{}")
        (folder / RUN_CONFIG).write_text(json.dumps(config.to_dict()))
        write_record(folder, iteration, describe_data(config))
    return folder


def truncate(folder):
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.truncate(3)


DAMAGES = {
    "__0_0.distcp has 3 bytes, 70 were written": truncate,
    "__0_0.distcp is missing": lambda folder: (folder / "__0_0.distcp").unlink(),
    "hf/tokenizer.json is not what was written": lambda folder: (folder / "hf/tokenizer.json").write_text(
        "[]"
    ),
    "checkpoint.json cannot be read": lambda folder: (folder / RECORD).write_text('{"files"'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_named(newest, message):
    check_files(newest)
    DAMAGES[message](newest)
    with pytest.raises(CheckpointError, match=message):
        check_files(newest)


def test_a_damaged_checkpoint_is_an_error_that_names_the_switch(newest, config):
    assert choose_checkpoint(config) == newest
    truncate(newest)
    with pytest.raises(CheckpointError, match=r"0_0.distcp has 3 bytes.*checkpoint.fall_back_if_damaged"):
        choose_checkpoint(config)
    assert newest in complete_checkpoints(newest.parent)


def test_the_run_falls_back_if_told_so(newest, config):
    truncate(newest)
    config.checkpoint.fall_back_if_damaged = True
    before = newest.parent / "iter_0000005"
    assert choose_checkpoint(config) == before
    assert complete_checkpoints(newest.parent) == [before]
    assert (newest.parent / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    # a second damage of the same iteration is set aside as well
    shutil.copytree(before, newest)
    truncate(newest)
    assert choose_checkpoint(config) == before
    assert (newest.parent / "iter_0000010.damaged").is_dir()
