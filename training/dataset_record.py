"""The record beside an indexed dataset: its files, what they were made of, and whether they are whole."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import CheckpointError, ConfigError
from training.slices import file_digest

FORMAT = 1
FOLDER_RECORD = "dataset.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")


def record_path(output: Path, is_folder: bool) -> Path:
    """Return the record of a folder of splits, or of the single dataset with a prefix."""
    return output / FOLDER_RECORD if is_folder else output.with_name(output.name + ".json")


@dataclass(frozen=True)
class Dataset:
    """Indexed datasets that were built together: those of `record["splits"]`, which lie in `folder`."""

    folder: Path
    record: dict[str, Any]
    # the one that was asked for, None for all splits of a folder
    name: str | None

    def prefix(self, split: str) -> Path:
        """Return the prefix of the files of a split; for a single dataset, which has all, its own."""
        return self.folder / (self.name or split)

    def split_record(self, split: str) -> dict[str, Any]:
        """Return the counts and digests of a split; a split that it lacks is a ConfigError."""
        if (name := self.name or split) not in self.record["splits"]:
            raise ConfigError(
                f"the dataset {self.folder} has no {split!r} split: it has"
                f" {', '.join(self.record['splits'])}; build it with one"
            )
        return self.record["splits"][name]


def find_dataset(path: str | Path) -> Dataset:
    """Find a folder of splits, a prefix, or one split of a folder by its prefix; else a CheckpointError."""
    path = Path(path)
    if path.is_dir():
        return Dataset(path, _read(path / FOLDER_RECORD), None)
    if (single := record_path(path, is_folder=False)).is_file():
        return Dataset(path.parent, _read(single), path.name)
    if (folder := path.parent / FOLDER_RECORD).is_file() and path.name in _read(folder)["splits"]:
        return Dataset(path.parent, _read(folder), path.name)
    raise CheckpointError(
        f"{path} is no complete dataset: neither {path / FOLDER_RECORD} nor {single} exists; `bridgeworks"
        " data build` makes one, `bridgeworks data adopt` describes .bin and .idx files from elsewhere"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent} is not a complete dataset folder: {error}") from error


def verify(dataset: Dataset) -> list[str]:
    """Compare every file with the record's digest and return what is wrong."""
    problems = []
    for split in dataset.record["splits"].values():
        for name, expected in split["sha256"].items():
            path = dataset.folder / name
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif (found := file_digest(str(path))) != expected:
                problems.append(f"{path} has SHA-256 {found}, its record says {expected}")
    return problems


def tokenizer_files(folder: Path) -> dict[str, str]:
    """Return the digests of the files that make up a tokenizer."""
    return {name: file_digest(str(folder / name)) for name in TOKENIZER_FILES if (folder / name).is_file()}
