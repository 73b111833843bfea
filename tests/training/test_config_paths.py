"""Relative paths of a config mean the same in a job's folder as where they were given."""

from pathlib import Path

import pytest

from bridge.errors import ConfigError
from training.config import ConfigContainer
from training.config_paths import check_paths, check_tokenizer, check_written, make_paths_absolute
from training.overrides import apply_overrides


def test_relative_paths_are_taken_from_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = apply_overrides(
        ConfigContainer(),
        {
            "checkpoint.export_hf": "exports",
            "logger.tensorboard_dir": "s3://bucket/curves",
            "profiling.output": "/tmp/profile",
            "tokenizer.tokenizer_model": "~/llama",
        },
    )
    make_paths_absolute(config, Path("/here"))
    assert config.checkpoint.export_hf == "/here/exports"
    assert config.logger.tensorboard_dir == "s3://bucket/curves"
    assert config.profiling.output == "/tmp/profile"
    assert config.tokenizer.tokenizer_model == "/home/me/llama"
    assert config.checkpoint.save is None


@pytest.mark.parametrize("name", ["checkpoint.export_hf", "profiling.output", "tokenizer.tokenizer_model"])
def test_addresses_are_no_folders(name: str) -> None:
    config = apply_overrides(ConfigContainer(), {"logger.tensorboard_dir": "s3://bucket/curves"})
    check_paths(config)
    with pytest.raises(ConfigError, match=f"{name} is s3://bucket/x, an address: give a folder"):
        check_paths(apply_overrides(config, {name: "s3://bucket/x"}))


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    address, new = {"logger.tensorboard_dir": "s3://bucket/x"}, {"checkpoint.export_hf": f"{tmp_path}/a/b"}
    check_written(apply_overrides(ConfigContainer(), address | new))
    assert not (tmp_path / "a").exists()
    for name in ("dataset.path_to_cache", "profiling.output"):
        with pytest.raises(ConfigError, match=rf"{name} is .*/file/x, but .*/file is no folder"):
            check_written(apply_overrides(ConfigContainer(), {name: f"{tmp_path}/file/x"}))


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    config = ConfigContainer()
    check_tokenizer(config)
    for folder in (tmp_path, tmp_path / "none"):
        config.tokenizer.tokenizer_model = str(folder)
        with pytest.raises(ConfigError, match=f"tokenizer_model is {folder}, but no tokenizer is there"):
            check_tokenizer(config)
    (tmp_path / "tokenizer.json").touch()
    config.tokenizer.tokenizer_model = str(tmp_path)
    check_tokenizer(config)
