"""The header of a safetensors file: where each of its tensors lies."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.dtypes import FROM_SAFETENSORS, ITEM_SIZES
from bridge.errors import CheckpointError

MAX_HEADER_SIZE = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Where a tensor's bytes lie: row-major, little-endian, `dtype` as torch names it."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


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
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _no_number(name: str) -> None:
    """Refuse NaN and the infinities, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is no number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value
