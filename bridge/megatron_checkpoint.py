"""A Megatron checkpoint folder: Megatron Core's files, the model's description, Hugging Face side files.

    .metadata, metadata.json, common.pt, *.distcp    Megatron Core's `torch_dist` format
    model.json                                       the model: `GPTModelProvider.to_dict()`
    hf/                                              config.json, generation config, tokenizer of the source

A training run's folder holds several, `iter_0000100/` and so on, and says which is the latest.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge.contained_path import contained_file
from bridge.errors import CheckpointError
from bridge.families import family_named, plan_weights, provider_of
from bridge.hf_checkpoint import CONFIG, read_config, read_json_object, side_files
from bridge.key_forms import as_stored
from bridge.mapping import WeightPlan
from bridge.megatron_arguments import check_arguments, provider_from_arguments, read_arguments
from bridge.provider import GPTModelProvider
from bridge.torch_dist.metadata import METADATA, Place, TorchDistMetadata, read_metadata

MODEL = "model.json"
HF_FOLDER = "hf"
LATEST = "latest_checkpointed_iteration.txt"

# What training saves beside the model: optimizer, one or several in a chain, and the states of its run.
TRAINING_STATE = (
    "optimizer.",
    "chained_",
    "rng_state",
    "fp8_state",
    "rerun_state_machine",
    "opt_param_scheduler",
)


@dataclass(frozen=True)
class MegatronCheckpoint:
    """An opened checkpoint: its model and where the model's tensors lie, no weights read."""

    path: Path
    provider: GPTModelProvider
    metadata: TorchDistMetadata
    side_files: tuple[Path, ...]

    @classmethod
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
        return cls(folder, provider, read_metadata(folder, skip=is_training_state), files)

    @property
    def places(self) -> Iterator[Place]:
        """Yield where the chunks of the model's tensors lie."""
        return (chunk.place for tensor in self.metadata.tensors.values() for chunk in tensor.chunks)

    def plan(self) -> WeightPlan:
        """Spell out every block between this checkpoint, by its own keys, and its Hugging Face view."""
        return as_stored(plan_weights(self.provider), self.metadata.tensors)


def model_of(folder: Path, config_from: Path | None, family: str | None) -> GPTModelProvider:
    """Describe the model of a resolved folder; for the options see `MegatronCheckpoint.open`."""
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
        raise CheckpointError(
            f"{path} has neither {METADATA} nor {LATEST}: give a Megatron checkpoint's folder"
        )
    latest = (path / LATEST).read_text().strip()
    # Megatron-LM writes a number, or "release" for weights that were converted and not trained.
    name = f"iter_{int(latest):07d}" if re.fullmatch("[0-9]+", latest) else "release"
    if (name == "release") != (latest == "release") or not (path / name / METADATA).is_file():
        raise CheckpointError(f"{path / LATEST} says {latest[:40]!r}, but {path} holds no such checkpoint")
    return path / name


def write_model(folder: Path, provider: GPTModelProvider, hf_files: Iterable[Path] = ()) -> None:
    """Describe the model of the checkpoint in `folder`; `hf_files` are copied into its hf/ as they are."""
    (folder / MODEL).write_text(json.dumps(provider.to_dict(), indent=1) + "\n")
    (folder / HF_FOLDER).mkdir(exist_ok=True)
    for file in hf_files:
        shutil.copyfile(file, folder / HF_FOLDER / file.name)


def copy_model(source: Path, folder: Path) -> None:
    """Take over the description and the side files of the checkpoint `source`, as training does."""
    hf_folder = source / HF_FOLDER
    config = [contained_file(hf_folder, CONFIG, hf_folder)] if (hf_folder / CONFIG).is_file() else []
    write_model(folder, read_model(source), [*config, *side_files(hf_folder)])


def read_model(folder: Path) -> GPTModelProvider:
    """Read the description of the model of a checkpoint."""
    file = folder / MODEL
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {MODEL}: name a Hugging Face folder of the same model for its config, or, for a"
            " checkpoint of Megatron-LM, its family (--config-from, --family)"
        )
    try:
        return GPTModelProvider.from_dict(read_json_object(file)).finalize()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is malformed: {error}") from error
