"""A Megatron checkpoint folder: Megatron Core's files, the model's description, Hugging Face side files.

    .metadata, metadata.json, common.pt, *.distcp    Megatron Core's `torch_dist` format
    model.json                                       the model: `GPTModelProvider.to_dict()`, and how many
                                                     rows there are behind its vocabulary
    hf/                                              config.json, generation config, tokenizer of the source

A training run's folder holds several, `iter_0000100/` and so on, and says which is the latest.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bridge.contained_path import contained_file
from bridge.errors import CheckpointError, ConfigError
from bridge.families import family_named, plan_weights, provider_of
from bridge.hf_checkpoint import CONFIG, read_config, read_json_object, side_files
from bridge.key_forms import as_stored
from bridge.mapping import WeightPlan
from bridge.megatron_arguments import check_arguments, padding_of, provider_from_arguments, read_arguments
from bridge.provider import GPTModelProvider
from bridge.refused_files import refused_files
from bridge.torch_dist.metadata import METADATA, SHARED_OBJECT, Place, TorchDistMetadata, read_metadata
from bridge.vocab_padding import VocabPadding

MODEL = "model.json"
HF_FOLDER = "hf"
NUM_PADDING_ROWS = "num_padding_rows"  # the key of model.json that is none of the provider's
LATEST = "latest_checkpointed_iteration.txt"
RUN_CHECKPOINTS = "checkpoints"  # where `bridgeworks train` and a release put those of a run

# What training saves beside the model: optimizer, one or several in a chain, and the states of its run.
TRAINING_STATE = (
    "optimizer.",
    "chained_",
    "rng_state",
    "fp8_state",
    "rerun_state_machine",
    "opt_param_scheduler",
)


class Vocabulary(NamedTuple):
    """The tokens of a checkpoint, None where it does not describe its model, and the rows behind them."""

    size: int | None
    padding: VocabPadding


@dataclass(frozen=True)
class MegatronCheckpoint:
    """An opened checkpoint: its model and where the model's tensors lie, no weights read."""

    path: Path
    provider: GPTModelProvider
    metadata: TorchDistMetadata
    side_files: tuple[Path, ...]
    padding: VocabPadding

    @classmethod
    @refused_files()
    def open(
        cls, path: str | Path, config_from: str | Path | None = None, family: str | None = None
    ) -> "MegatronCheckpoint":
        """Open a checkpoint or the latest one of a training run; anything wrong is an InputError.

        Plain Megatron-LM stores neither config nor tokenizer. `config_from` is a Hugging Face folder, or
        another Megatron one, whose own are taken, and held against the arguments of the training; `family` is
        the `model_type` whose config is made from those arguments.
        """
        folder = resolve_checkpoint(Path(path))
        provider = model_of(folder, Path(config_from) if config_from else None, family)
        hf_folder = side_folder(Path(config_from) if config_from else folder)
        files = tuple(side_files(hf_folder)) if hf_folder.is_dir() else ()
        metadata = read_metadata(folder, skip=is_training_state)
        return cls(folder, provider, metadata, files, read_vocabulary(folder).padding)

    @property
    def places(self) -> Iterator[Place]:
        """Yield where the chunks of the model's tensors lie."""
        return (chunk.place for tensor in self.metadata.tensors.values() for chunk in tensor.chunks)

    def plan(self) -> WeightPlan:
        """Spell out every block between this checkpoint, by its own keys, and its Hugging Face view."""
        return as_stored(plan_weights(self.provider), self.metadata.tensors)


def model_of(folder: Path, config_from: Path | None, family: str | None) -> GPTModelProvider:
    """Describe the model of a resolved folder; for the options see `MegatronCheckpoint.open`."""
    provider = _described_by(folder, config_from, family)
    if family is not None and family_named(family).model_type != provider.hf_model_type:
        raise ConfigError(
            f"{folder} is described as a model of the family {provider.hf_model_type!r}, not {family!r}:"
            " leave out --family"
        )
    return provider


def _described_by(folder: Path, config_from: Path | None, family: str | None) -> GPTModelProvider:
    if config_from is not None:
        provider, file = _described(config_from)
        if arguments := read_arguments(folder):
            check_arguments(provider, arguments, file)
        return provider
    if (folder / MODEL).is_file() or family is None:
        return read_model(folder)
    arguments = read_arguments(folder)
    if arguments is None:
        raise CheckpointError(
            f"{folder} holds no arguments of Megatron-LM: name a Hugging Face folder of the same model"
            " (--config-from)"
        )
    return provider_from_arguments(arguments, family_named(family).model_type)


def _described(folder: Path) -> tuple[GPTModelProvider, Path]:
    """Read the model of either kind of folder, and name the file that describes it."""
    if not is_megatron_checkpoint(folder):
        return provider_of(read_config(folder)), folder / CONFIG
    folder = resolve_checkpoint(folder)
    return read_model(folder), folder / MODEL


def side_folder(end: Path) -> Path:
    """Return the folder where config.json and tokenizer of either kind of folder would lie."""
    return resolve_checkpoint(end) / HF_FOLDER if is_megatron_checkpoint(end) else end


def is_training_state(key: str) -> bool:
    """Say whether a key belongs to a training run's state rather than to the model."""
    return key.startswith(TRAINING_STATE)


def is_megatron_checkpoint(path: Path) -> bool:
    """Say whether a folder is a Megatron checkpoint or holds those of a training run."""
    return (path / METADATA).is_file() or (path / LATEST).is_file()


def resolve_checkpoint(path: Path) -> Path:
    """Return the folder if it is a checkpoint, else the latest checkpoint of the training run in it."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: give the folder of a Megatron checkpoint")
    if (path / METADATA).is_file():
        return path
    if not (path / LATEST).is_file():
        if (inner := path / RUN_CHECKPOINTS / LATEST).is_file():
            raise CheckpointError(f"{path} is a run's folder: give that of its checkpoints, {inner.parent}")
        raise CheckpointError(
            f"{path} has neither {METADATA} nor {LATEST}: give a Megatron checkpoint's folder"
        )
    latest = (path / LATEST).read_text(errors="replace").strip()
    # Megatron-LM writes a number, or "release" for weights that were converted and not trained.
    name = f"iter_{int(latest):07d}" if re.fullmatch("[0-9]+", latest) else "release"
    if (name == "release") != (latest == "release") or not (path / name).is_dir():
        raise CheckpointError(f"{path / LATEST} says {latest[:40]!r}, but {path} holds no such checkpoint")
    if not (path / name / METADATA).is_file():
        raise CheckpointError(
            f"{path / name} has no {METADATA}: it is not complete, or of another format than torch_dist, in"
            " which Megatron-LM saves with --ckpt-format torch_dist"
        )
    return path / name


def write_model(
    folder: Path, provider: GPTModelProvider, hf_files: Iterable[Path] = (), *, num_padding_rows: int
) -> None:
    """Describe the model of the checkpoint in `folder`; `hf_files` are copied into its hf/ as they are.

    `num_padding_rows` is how many rows its embedding has beyond the vocabulary, for an export to take off.
    """
    description = {**provider.to_dict(), NUM_PADDING_ROWS: num_padding_rows}
    (folder / MODEL).write_text(json.dumps(description, indent=1) + "\n")
    (folder / HF_FOLDER).mkdir(exist_ok=True)
    for file in hf_files:
        shutil.copyfile(file, folder / HF_FOLDER / file.name)


def copy_model(source: Path, folder: Path, *, num_padding_rows: int) -> None:
    """Take over the description and the side files of the checkpoint `source`, as training does."""
    hf_folder = source / HF_FOLDER
    config = [contained_file(hf_folder, CONFIG, hf_folder)] if (hf_folder / CONFIG).is_file() else []
    files = [*config, *side_files(hf_folder)]
    write_model(folder, read_model(source), files, num_padding_rows=num_padding_rows)


def read_model(folder: Path) -> GPTModelProvider:
    """Read the description of the model of a checkpoint."""
    return _read_description(folder)[0]


def read_vocabulary(folder: Path) -> Vocabulary:
    """Return what a resolved folder says of its vocabulary."""
    if (folder / MODEL).is_file():
        provider, num_rows = _read_description(folder)
        return Vocabulary(provider.vocab_size, VocabPadding(num_rows, provider.make_vocab_size_divisible_by))
    arguments = read_arguments(folder) if (folder / SHARED_OBJECT).is_file() else None
    return Vocabulary(None, padding_of(arguments) if arguments else VocabPadding())


def _read_description(folder: Path) -> tuple[GPTModelProvider, int | None]:
    """Read a model and its padding rows; their number is missing in checkpoints of before it was recorded."""
    file = folder / MODEL
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {MODEL}: name a Hugging Face folder of the same model for its config, or, for a"
            " checkpoint of Megatron-LM, its family (--config-from, --family)"
        )
    try:
        description = read_json_object(file)
        num_rows = description.pop(NUM_PADDING_ROWS, None)
        if num_rows is not None and (type(num_rows) is not int or num_rows < 0):
            raise ValueError(f"{NUM_PADDING_ROWS} is {num_rows!r}, no number of rows")
        return GPTModelProvider.from_dict(description).finalize(), num_rows
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is malformed: {error}") from error
