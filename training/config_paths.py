"""The places that a config names: a job runs in a folder of its own, where a relative path is another one."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.errors import ConfigError
from bridge.hf_checkpoint import side_files

if TYPE_CHECKING:
    from training.config import ConfigContainer

# beside the dataset's, see blend.with_absolute_paths
PATHS = (
    *("checkpoint.load", "checkpoint.export_hf", "logger.tensorboard_dir", "profiling.output"),
    "tokenizer.tokenizer_model",
)
WRITTEN = (
    *("checkpoint.export_hf", "logger.tensorboard_dir", "profiling.output"),
    "dataset.path_to_cache",
)
ADDRESSES = ("logger.tensorboard_dir",)  # TensorBoard writes to them itself


def check_paths(config: "ConfigContainer") -> None:
    """Refuse addresses where only folders of this machine can be used."""
    for name in PATHS:
        section, _, field = name.partition(".")
        value = getattr(getattr(config, section), field)
        if value and "://" in value and name not in ADDRESSES:
            raise ConfigError(f"{name} is {value}, an address: give a folder of this machine")


def make_paths_absolute(config: "ConfigContainer", folder: Path) -> None:
    """Take the config's relative paths from `folder`; those of the dataset are left as they are."""
    for name in PATHS:
        section, _, field = name.partition(".")
        if value := getattr(getattr(config, section), field):
            setattr(getattr(config, section), field, anchored(value, folder))


def anchored(path: str, folder: Path) -> str:
    """Return a relative path as one below `folder`; an address stays as it is."""
    return path if "://" in path else str(folder / expanded(path))


def expanded(path: str) -> str:
    """Return a path with ~ replaced; of a user that is unknown it stays, where `Path` would raise."""
    return os.path.expanduser(path)  # noqa: PTH111


def check_tokenizer(config: "ConfigContainer") -> None:
    """Refuse a tokenizer, by its absolute path, that is none: checkpoints are to have its files."""
    folder = config.tokenizer.tokenizer_model
    if folder and not (Path(folder).is_dir() and side_files(Path(folder))):
        raise ConfigError(
            f"tokenizer.tokenizer_model is {folder}, but no tokenizer is there: give a Hugging Face folder"
        )


def check_written(config: "ConfigContainer") -> None:
    """Refuse places that a run writes to, absolute ones, where this machine can make no folder."""
    for name in WRITTEN:
        section, _, field = name.partition(".")
        value = getattr(getattr(config, section), field)
        if not value or "://" in value:
            continue
        found = next(each for each in (Path(value), *Path(value).parents) if each.exists())
        if not (found.is_dir() and os.access(found, os.W_OK)):
            raise ConfigError(
                f"{name} is {value}, but {found} is no folder that can be written to: give another"
            )
