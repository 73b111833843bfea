"""Megatron's indexed datasets as files: `.bin` holds the tokens, `.idx` where each document lies in it.

The layout is that of megatron/core/datasets/indexed_dataset.py, whose import costs six seconds and whose
builder computes the offsets in a Python loop; a test holds the two byte for byte against each other.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from bridge.errors import CheckpointError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, numpy.dtype[Any]] = {
    4: numpy.dtype("<i4"),
    8: numpy.dtype("<u2"),
}  # Megatron's codes of what it trains on
LARGEST_UINT16_VOCABULARY = 65499  # DType.optimal_dtype


def token_dtype(vocab_size: int) -> numpy.dtype:
    """Return the type that Megatron stores tokens of such a vocabulary in."""
    return DTYPES[8] if vocab_size <= LARGEST_UINT16_VOCABULARY else DTYPES[4]


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def index_bytes(lengths: NDArray[numpy.int32], dtype: numpy.dtype) -> bytes:
    """Return the `.idx` file of documents of so many tokens each, one sequence a document."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    offsets = numpy.zeros(len(lengths), dtype="<i8")
    numpy.cumsum(lengths[:-1], dtype="<i8", out=offsets[1:])
    offsets *= dtype.itemsize
    documents = numpy.arange(len(lengths) + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents))
    return b"".join((header, lengths.astype("<i4").tobytes(), offsets.tobytes(), documents.tobytes()))


@dataclass(frozen=True)
class IndexedFiles:
    """An indexed dataset, memory-mapped."""

    lengths: NDArray[numpy.int32]
    offsets: NDArray[numpy.int64]  # in bytes
    tokens: NDArray

    def document(self, number: int) -> NDArray:
        start = int(self.offsets[number]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.lengths[number])]


def open_indexed(prefix: Path) -> IndexedFiles:
    """Map the two files of `prefix`; a missing, foreign or truncated one is a CheckpointError."""
    try:
        with idx_path(prefix).open("rb") as file:
            magic, version, code, sequences, documents = HEADER.unpack(file.read(HEADER.size))
        stored = bin_path(prefix).stat().st_size
    except (OSError, struct.error) as error:
        raise CheckpointError(f"{prefix} is no indexed dataset of .bin and .idx: {error}") from error
    if magic != MAGIC or version != VERSION or code not in DTYPES:
        raise CheckpointError(
            f"{idx_path(prefix)} has magic {magic!r}, version {version} and type {code}: expected {MAGIC!r},"
            f" {VERSION} and one of {sorted(DTYPES)}"
        )
    expected = HEADER.size + 12 * sequences + 8 * documents
    if idx_path(prefix).stat().st_size != expected:
        raise CheckpointError(f"{idx_path(prefix)} is truncated: expected {expected} bytes")
    lengths = _mapped(idx_path(prefix), "<i4", HEADER.size, sequences)
    offsets = _mapped(idx_path(prefix), "<i8", HEADER.size + 4 * sequences, sequences)
    dtype = DTYPES[code]
    expected = int(lengths.sum(dtype=numpy.int64)) * dtype.itemsize
    if stored != expected:
        raise CheckpointError(f"{bin_path(prefix)} has {stored} bytes, its index says {expected}")
    return IndexedFiles(lengths, offsets, _mapped(bin_path(prefix), dtype, 0, stored // dtype.itemsize))


def _mapped(path: Path, dtype: str | numpy.dtype, offset: int, count: int) -> NDArray:
    if count == 0:  # an empty range cannot be mapped
        return numpy.zeros(0, dtype=dtype)
    return numpy.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
