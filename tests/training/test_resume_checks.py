import json
import shutil

import pytest

from bridge.errors import ConfigError
from training.checkpoint_record import write_record
from training.overrides import apply_overrides
from training.resume_checks import MAY_CHANGE, RUN_CONFIG, check_resume, describe_data


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """A checkpoint of the tiny run, as far as it says what the run was."""
    config = tiny_config().validate(1)
    (tmp_path / RUN_CONFIG).write_text(json.dumps(config.to_dict()))
    write_record(tmp_path, 3, describe_data(config))
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dataset.random_seed": 7}, "dataset.random_seed is 7, but was 1234"),
        ({"model.seq_length": 64}, "model.seq_length is 64, but was 32"),
        ({"dataset.blend": [], "dataset.mock": True}, "dataset.mock is True, but was False"),
        ({"dataset.eod_mask_loss": True}, "dataset.eod_mask_loss is True, but was False"),
    ],
)
def test_other_data_are_refused_unless_allowed(tiny_config, checkpoint, overrides, message):
    check_resume(tiny_config().validate(1), checkpoint)
    config = tiny_config(**overrides).validate(1)
    with pytest.raises(ConfigError, match=rf"{message}.*checkpoint.allow_changed_data"):
        check_resume(config, checkpoint)
    check_resume(apply_overrides(config, {"checkpoint.allow_changed_data": True}), checkpoint)


def test_a_dataset_may_move_but_not_change(tiny_config, checkpoint, dataset, tmp_path):
    moved = shutil.copytree(dataset, tmp_path / "moved")
    config = tiny_config(**{"dataset.blend": [str(moved)]}).validate(1)
    check_resume(config, checkpoint)
    record = json.loads((moved / "dataset.json").read_text())
    record["splits"]["train"]["sha256"]["train.bin"] = "0" * 64
    (moved / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"moved/train \(SHA-256 000000000000\), but was .*dataset/train"):
        check_resume(config, checkpoint)


def test_one_split_of_a_folder_is_known_by_its_own_file(tiny_config, dataset):
    names = ("valid", "train")
    per_split = {"train": [f"{dataset}/{name}" for name in names], "valid": [f"{dataset}/test"]}
    config = tiny_config(**{"dataset.blend": [], "dataset.blend_per_split": per_split}).validate(1)
    splits = json.loads((dataset / "dataset.json").read_text())["splits"]
    expected = [(f"{dataset}/{name}", splits[name]["sha256"][f"{name}.bin"]) for name in names]
    assert [(each["path"], each["sha256"]) for each in describe_data(config)["train"]] == expected


def test_other_weights_of_a_blend_are_refused(tiny_config, checkpoint, dataset, tmp_path):
    copied = shutil.copytree(dataset, tmp_path / "copied")

    def blend(first, second):
        blend = [{"path": str(dataset), "weight": first}, {"path": str(copied), "weight": second}]
        return tiny_config(**{"dataset.blend": blend}).validate(1)

    with pytest.raises(ConfigError, match=r"the blend is .*dataset/train, .*copied/train, but was"):
        check_resume(blend(0.3, 0.7), checkpoint)
    write_record(checkpoint, 3, describe_data(blend(0.3, 0.7)))
    check_resume(blend(3, 7), checkpoint)
    with pytest.raises(ConfigError, match=r"the share of .*dataset/train is 0.4, but was 0.3"):
        check_resume(blend(0.4, 0.6), checkpoint)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.layernorm_epsilon": 1e-3}, "model.layernorm_epsilon is 0.001, but 1e-0"),
        ({"model.num_layers": 8}, "model.num_layers is 8, but 4"),
        ({"model.rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "this is another model"),
    ],
)
def test_another_model_is_refused_whatever_is_allowed(tiny_config, checkpoint, overrides, message):
    config = tiny_config(**overrides, **{"checkpoint.allow_changed_data": True}).validate(1)
    with pytest.raises(ConfigError, match=message):
        check_resume(config, checkpoint)


def test_another_batch_size_is_refused_where_the_rate_counts_samples(tiny_config, tmp_path):
    settings = {"scheduler.lr_decay_style": "inverse-square-root", "scheduler.lr_warmup_iters": 0}
    config = tiny_config(**settings).validate(1)
    (tmp_path / RUN_CONFIG).write_text(json.dumps(config.to_dict()))
    write_record(tmp_path, 3, describe_data(config))
    check_resume(config, tmp_path)
    with pytest.raises(ConfigError, match=r"train.global_batch_size is 4, but was 8"):
        check_resume(tiny_config(**settings, **{"train.global_batch_size": 4}).validate(1), tmp_path)
    settings["scheduler.lr_warmup_iters"] = 1
    check_resume(tiny_config(**settings, **{"train.global_batch_size": 4}).validate(1), tmp_path)


def test_the_run_may_be_spread_and_computed_in_another_way(tiny_config, checkpoint):
    overrides = {
        "model.tensor_model_parallel_size": 2,
        "model.sequence_parallel": True,
        "model.recompute_granularity": "selective",
        "model.hidden_dropout": 0.5,
        "mixed_precision.bf16": True,
        "train.train_iters": 99,
        "train.global_batch_size": 4,
    }
    check_resume(tiny_config(**overrides).validate(2), checkpoint)


def test_what_may_change_are_fields_of_the_model(tiny_config):
    assert set(tiny_config().model.to_dict()) >= MAY_CHANGE
