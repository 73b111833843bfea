"""Reader of a Hugging Face checkpoint folder: its config, and where each tensor lies in the shards."""

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.contained_path import check_contained, contained_file
from bridge.errors import CheckpointError
from bridge.quantization import HfTensor, QuantizedTensor, dequantized
from bridge.refused_files import refused_files
from bridge.shard_header import TensorSlice, read_json_object, read_safetensors

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"

# Files that belong to a checkpoint besides config and weights: their names fit a pattern and end as below.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
# Neither code nor pickles; Mistral numbers its tokenizers: tokenizer.model.v3, tokenizer.model.v7m1.
SIDE_SUFFIX = re.compile(r"|\.(json|txt|md|model|jinja|tiktoken)|\.v\d+(m\d+)?")


@dataclass(frozen=True)
class HfCheckpoint:
    """An opened folder: every tensor located and every header checked, no weights read."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, HfTensor]
    """By name; a quantised tensor is what it stands for, its scales are no tensor of their own."""

    @classmethod
    @refused_files()
    def open(cls, path: str | Path) -> "HfCheckpoint":
        """Read config, index and shard headers of `path`; anything wrong is a CheckpointError."""
        folder = Path(path)
        config = read_config(folder)
        return cls(folder, config, dequantized(config, _read_tensors(folder)))

    @property
    def quantization(self) -> str | None:
        """The method by which weights are quantised in the files, whatever the config says; None for none."""
        methods = (tensor.method for tensor in self.tensors.values() if isinstance(tensor, QuantizedTensor))
        return next(methods, None)

    def side_files(self) -> list[Path]:
        """List the files that travel with the weights: generation config, tokenizer, licence."""
        return side_files(self.path)


@refused_files()
def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint folder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder of a Hugging Face checkpoint")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: give the folder of a Hugging Face checkpoint")
    return read_json_object(contained_file(folder, CONFIG, folder))


def side_files(folder: Path) -> list[Path]:
    """List the side files of a checkpoint folder, in order of name."""
    found = sorted(path for path in folder.iterdir() if is_side_file(path.name) and path.is_file())
    for path in found:
        check_contained(folder, path)
    return found


def is_side_file(name: str) -> bool:
    """Say whether a file of this name belongs to a checkpoint besides its config and weights."""
    is_named = any(fnmatch.fnmatchcase(name, pattern) for pattern in SIDE_FILES)
    return is_named and SIDE_SUFFIX.fullmatch(Path(name).suffix) is not None


def _read_tensors(folder: Path) -> dict[str, TensorSlice]:
    # transformers looks for the single file first, and so do we, or the two would read different weights.
    if (folder / SINGLE_SHARD).is_file():
        return read_safetensors(contained_file(folder, SINGLE_SHARD, folder))
    if (folder / INDEX).is_file():
        return _read_shards(folder, contained_file(folder, INDEX, folder))
    raise CheckpointError(
        f"{folder} has neither {SINGLE_SHARD} nor {INDEX}: only safetensors weights are read;"
        " save other formats anew with transformers' save_pretrained"
    )


def _read_shards(folder: Path, index: Path) -> dict[str, TensorSlice]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' of tensor names to file names")
    tensors: dict[str, TensorSlice] = {}
    for file in sorted(set(weight_map.values())):
        shard = read_safetensors(contained_file(folder, file, index))
        if extra := sorted(name for name in shard if weight_map.get(name) != file):
            raise CheckpointError(
                f"{folder / file} holds {extra[0]!r}, which {index.name} does not place there"
            )
        tensors.update(shard)
    if missing := sorted(set(weight_map) - set(tensors)):
        name = missing[0]
        raise CheckpointError(f"{index} places {name!r} in {weight_map[name]}, which does not hold it")
    return tensors
