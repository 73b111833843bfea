"""Reader of a Hugging Face checkpoint folder: its config, and where each tensor lies in the shards."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.contained_path import check_contained, contained_file
from bridge.dtypes import FROM_SAFETENSORS, ITEM_SIZES
from bridge.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
MAX_HEADER_SIZE = 100_000_000  # the limit of the safetensors library

# Files that belong to a checkpoint besides its config and weights. No code: *.py is not among them.
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


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Where a tensor's bytes lie: row-major, little-endian, `dtype` as torch names it."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class HfCheckpoint:
    """An opened folder: every tensor located and every header checked, no weights read."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSlice]

    @classmethod
    def open(cls, path: str | Path) -> "HfCheckpoint":
        """Read config, index and shard headers of `path`; anything wrong is a CheckpointError."""
        folder = Path(path)
        return cls(folder, read_config(folder), _read_tensors(folder))

    def side_files(self) -> list[Path]:
        """List the files that travel with the weights: generation config, tokenizer, licence."""
        return side_files(self.path)


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint folder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder of a Hugging Face checkpoint")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: give the folder of a Hugging Face checkpoint")
    return read_json_object(contained_file(folder, CONFIG, folder))


def side_files(folder: Path) -> list[Path]:
    """List the side files of a checkpoint folder, in order of name."""
    found = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    found = {path for path in found if path.suffix != ".py"}
    for path in found:
        check_contained(folder, path)
    return sorted(found)


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


def read_safetensors(file: Path) -> dict[str, TensorSlice]:
    """Read the header of one safetensors file and check that its tensors tile the file exactly."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{file} is truncated: {size} bytes hold no safetensors header")
        (header_size,) = struct.unpack("<Q", start)
        if header_size > min(MAX_HEADER_SIZE, size - 8):
            raise CheckpointError(
                f"{file} is truncated or no safetensors file: header of {header_size} bytes"
            )
        header = _parse_json_object(stream.read(header_size), file)
    header.pop("__metadata__", None)
    tensors = {name: _tensor_slice(file, 8 + header_size, name, entry) for name, entry in header.items()}
    _check_tiling(file, tensors, 8 + header_size, size)
    return tensors


def _tensor_slice(file: Path, data_start: int, name: str, entry: Any) -> TensorSlice:
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            type(size) is int and size >= 0 for size in shape
        ):
            pass
        case _:
            raise CheckpointError(f"{file}: the header entry of {name!r} is malformed")
    if code not in FROM_SAFETENSORS:
        raise CheckpointError(f"{file}: {name!r} has dtype {code}: allowed are {', '.join(FROM_SAFETENSORS)}")
    dtype = FROM_SAFETENSORS[code]
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if begin < 0 or end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {name!r} of shape {shape} and dtype {code} needs {nbytes} bytes,"
            f" the header gives it bytes {begin} to {end}"
        )
    return TensorSlice(file, data_start + begin, nbytes, tuple(shape), dtype)


def _check_tiling(file: Path, tensors: dict[str, TensorSlice], data_start: int, size: int) -> None:
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            raise CheckpointError(
                f"{file}: the bytes of {name!r} overlap another tensor or leave a gap before it"
            )
        position += tensor.nbytes
    if position > size:
        raise CheckpointError(
            f"{file} is truncated: its header needs {position} bytes, it has {size}: fetch it again"
        )
    if position < size:
        raise CheckpointError(f"{file} has {size - position} bytes after its last tensor: fetch it again")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; anything else is a CheckpointError."""
    return _parse_json_object(path.read_bytes(), path)


def _parse_json_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value
