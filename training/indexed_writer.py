"""Indexed datasets put together from shards: one, or one a split with each document in one of them."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from bridge.errors import ConfigError, InputError
from training.indexed_files import bin_path, idx_path, index_bytes
from training.shards import SHOWN_FAULTS, Settings, Shard, read_shard, read_tokens

SPLITS = ("train", "valid", "test")
DIGEST = numpy.dtype([("high", "u8"), ("low", "u8")])


@dataclass
class Merged:
    """The record of every dataset that was written, and what was left out of all of them."""

    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    blank: int = 0
    skipped: int = 0
    faults: list[str] = field(default_factory=list)

    def note(self, shard: Shard) -> None:
        self.blank += shard.blank
        self.skipped += shard.skipped
        self.faults = (self.faults + shard.faults)[:SHOWN_FAULTS]


def merge(keys: list[str], settings: Settings, folder: Path, names: list[str], split: list[float]) -> Merged:
    """Write the documents of the shards in order, up to the limit of the settings, below `folder`.

    The documents go to the datasets `names` by the fractions of `split` (for one dataset: [1.0]). The choice
    is by their digests: random, independent of the order of the files, and the same for a repeated document.
    """
    bounds = _bounds((shard.digests for _, shard in _limited(keys, settings)), split)
    writers = {
        number: _Writer(folder / name, numpy.dtype(settings.dtype))
        for number, (name, fraction) in enumerate(zip(names, split, strict=True))
        if fraction
    }
    merged = Merged()
    for key, shard in _limited(keys, settings):
        merged.note(shard)
        choice = _choice(shard.digests, bounds)
        tokens = read_tokens(settings.folder, key, settings.dtype)
        for number, writer in writers.items():
            writer.add(tokens[: int(shard.lengths.sum(dtype=numpy.int64))], shard, choice == number)
    merged.splits = {names[number]: writer.finish() for number, writer in writers.items()}
    return merged


def check_split(split: list[float]) -> None:
    if len(split) != len(SPLITS) or min(split) < 0 or abs(sum(split) - 1) > 1e-6 or split[0] == 0:
        raise ConfigError(
            f"split is {split}: give three fractions for train, valid and test that add up to 1"
        )


def _limited(keys: list[str], settings: Settings) -> Iterator[tuple[str, Shard]]:
    """Yield the shards, cut before the document that would exceed the limit of text."""
    remaining = settings.max_bytes
    for key in keys:
        shard = read_shard(settings.folder, key)
        if remaining is not None:
            kept = int(numpy.searchsorted(numpy.cumsum(shard.nbytes), remaining, side="right"))
            remaining -= int(shard.nbytes[:kept].sum())
            if kept < len(shard.nbytes):
                yield key, _first(shard, kept)
                return
        yield key, shard


def _first(shard: Shard, count: int) -> Shard:
    return replace(
        shard, lengths=shard.lengths[:count], nbytes=shard.nbytes[:count], digests=shard.digests[:count]
    )


def _bounds(digests: Iterable[NDArray], split: list[float]) -> NDArray:
    """Return the digests that end the held-out splits: the smallest are for valid, the next for test."""
    if len(split) == 1:
        return numpy.zeros(0, DIGEST)
    different = numpy.unique(_sortable(numpy.concatenate(list(digests))))
    held_out = [max(1, round(len(different) * fraction)) if fraction else 0 for fraction in split[1:]]
    if sum(held_out) >= len(different):
        raise InputError(f"{len(different)} different documents are too few for the split {split}")
    return different[numpy.cumsum(held_out)]


def _choice(digests: NDArray, bounds: NDArray) -> NDArray:
    """Return the number of each document's dataset in the order train, valid, test."""
    if not len(bounds):
        return numpy.zeros(len(digests), int)
    return (numpy.searchsorted(bounds, _sortable(digests), side="right") + 1) % len(SPLITS)


def _sortable(digests: NDArray) -> NDArray:
    return numpy.ascontiguousarray(digests).view(DIGEST).reshape(-1)


class _Writer:
    """Writes one indexed dataset."""

    def __init__(self, prefix: Path, dtype: numpy.dtype) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.file = bin_path(prefix).open("wb")
        self.digest = hashlib.sha256()
        self.lengths: list[NDArray] = []
        self.nbytes = 0

    def add(self, tokens: NDArray, shard: Shard, chosen: NDArray) -> None:
        """Append the chosen ones of the documents whose tokens these are."""
        lengths = shard.lengths[chosen]
        if len(lengths) < len(chosen):
            tokens = tokens[numpy.repeat(chosen, shard.lengths)]
        self.file.write(tokens.data)
        self.digest.update(tokens.data)
        self.lengths.append(lengths)
        self.nbytes += int(shard.nbytes[chosen].sum())

    def finish(self) -> dict[str, Any]:
        """Write the index and return counts and digests."""
        self.file.close()
        lengths = numpy.concatenate([numpy.zeros(0, numpy.int32), *self.lengths])
        index = index_bytes(lengths, self.dtype)
        idx_path(self.prefix).write_bytes(index)
        return {
            "documents": len(lengths),
            "tokens": int(lengths.sum(dtype=numpy.int64)),
            "bytes": self.nbytes,
            "sha256": {
                bin_path(self.prefix).name: self.digest.hexdigest(),
                idx_path(self.prefix).name: hashlib.sha256(index).hexdigest(),
            },
        }
