import json
import shutil
import zlib
from collections.abc import Iterator

import pytest

from bridge import distributed
from bridge.errors import CheckpointError
from training.checkpoint_choice import last_checkpoint
from training.checkpoint_folders import complete_checkpoints
from training.checkpoint_record import RECORD, check_files, check_tensors, share, write_record
from training.config import CheckpointConfig, ConfigContainer
from training.resume_checks import RUN_CONFIG, describe_data


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.start_process_group()
    yield
    distributed.finalize()


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
        crcs = {"__0_0.distcp": zlib.crc32(b"tensors" * iteration)}
        write_record(folder, iteration, describe_data(config), crcs)
    return folder


def truncate(folder):
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.truncate(3)


def flip_a_bit(folder):
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.seek(13)
        file.write(bytes([ord("s") ^ 1]))


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


def test_a_changed_bit_of_a_tensor_is_named(newest, config):
    check_tensors(newest, 0, 1)
    flip_a_bit(newest)
    check_files(newest)
    with pytest.raises(CheckpointError, match=r"0_0\.distcp is not what was written$"):
        check_tensors(newest, 0, 1)
    with pytest.raises(CheckpointError, match=r"0_0.distcp is not what.*checkpoint.fall_back_if_damaged"):
        last_checkpoint(config)
    config.checkpoint.verify_tensors = False
    assert last_checkpoint(config) == newest


def test_ranks_share_the_files_of_tensors():
    files = {f"__{rank}_{number}.distcp": 10 for rank in range(12) for number in (0, 1)}
    shares = [share(files, rank, 4) for rank in range(4)]
    assert sorted(name for names in shares for name in names) == sorted(files)
    assert shares[0] == [f"__{rank}_{number}.distcp" for rank in range(3) for number in (0, 1)]
    assert sorted(share({**files, "__0_0.distcp": 0}, 0, 1)) == sorted(files)
    # one that is much larger than the others
    assert [len(share({**files, "__3_0.distcp": 10_000}, rank, 4)) for rank in range(4)] == [6, 0, 0, 18]
    assert share({}, 0, 4) == []


def test_a_damaged_checkpoint_is_an_error_that_names_the_switch(newest, config):
    assert last_checkpoint(config) == newest
    truncate(newest)
    with pytest.raises(CheckpointError, match=r"0_0.distcp has 3 bytes.*checkpoint.fall_back_if_damaged"):
        last_checkpoint(config)
    assert newest in complete_checkpoints(newest.parent)


def test_the_run_falls_back_if_told_so(newest, config):
    flip_a_bit(newest)
    config.checkpoint.fall_back_if_damaged = True
    before = newest.parent / "iter_0000005"
    assert last_checkpoint(config) == before
    assert complete_checkpoints(newest.parent) == [before]
    assert (newest.parent / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    # a second damage of the same iteration is set aside as well
    shutil.copytree(before, newest)
    truncate(newest)
    assert last_checkpoint(config) == before
    assert (newest.parent / "iter_0000010.damaged").is_dir()
    # where no one is left, nothing may be said to be the latest
    truncate(before)
    assert last_checkpoint(config) is None
    assert not (newest.parent / "latest_checkpointed_iteration.txt").exists()
