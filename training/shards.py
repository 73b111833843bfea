"""The tokens of one slice of the input, kept in files until all slices are there."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO

import numpy
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bridge.errors import InputError
from training.documents import read_piece
from training.slices import Slice

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20
SHOWN_FAULTS = 10
PARTIAL = ".partial"


@dataclass(frozen=True)
class Settings:
    """What the tokens of a slice depend on besides its text; `folder` holds the tokenizer and the shards."""

    folder: str
    tokenizer_digest: str  # of its serialised form
    text_key: str
    eod: int | None  # ends every document
    dtype: str
    skip_faults: bool
    split_special_tokens: bool  # text that spells one is text; the serialised tokenizer does not say
    max_bytes: int | None

    @property
    def tokenizer(self) -> Path:
        return Path(self.folder, f"tokenizer-{self.tokenizer_digest}.json")

    @property
    def digest(self) -> str:
        """Name the settings, wherever the shards are kept."""
        values = json.dumps({**asdict(self), "folder": None}, sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A tokenised slice: per document its number of tokens, bytes of text and half of its SHA-256."""

    lengths: NDArray[numpy.int32]
    nbytes: NDArray[numpy.int64]
    digests: NDArray[numpy.uint64]  # [documents, 2]
    blank: int
    skipped: int
    faults: list[str]  # the first of those skipped


def tokenise(part: Slice, settings: Settings) -> str:
    """Write the shard of `part` unless it is there, and return its key."""
    files = _files(settings.folder, part.key)
    if not all(path.is_file() for path in files):
        _Writer(settings).write(part, *files)
    return part.key


def read_shard(folder: str, key: str) -> Shard:
    """Read what a finished shard says of its documents."""
    with numpy.load(_files(folder, key)[1], allow_pickle=False) as arrays:
        notes = json.loads(arrays["notes"].tobytes())
        return Shard(arrays["lengths"], arrays["nbytes"], arrays["digests"], **notes)


def read_tokens(folder: str, key: str, dtype: str) -> NDArray:
    """Map the tokens of a finished shard."""
    path = _files(folder, key)[0]
    return numpy.memmap(path, dtype, "r") if path.stat().st_size else numpy.zeros(0, dtype)


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that has its name only when it is complete, after a power failure too."""
    # two workers may write the same shard, if an input is given twice
    beside = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    with beside.open("wb") as output:
        yield output
        output.flush()
        os.fsync(output.fileno())
    beside.replace(path)


def _files(folder: str, key: str) -> tuple[Path, Path]:
    return Path(folder, f"{key}.bin"), Path(folder, f"{key}.npz")


class _Writer:
    """Tokenises the documents of a slice batch by batch."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = _load(settings.tokenizer, settings.split_special_tokens)
        self.lengths: list[int] = []
        self.nbytes: list[int] = []
        self.digests: list[bytes] = []
        self.blank = self.skipped = 0
        self.faults: list[str] = []

    def write(self, part: Slice, tokens: Path, index: Path) -> None:
        with _whole(tokens) as output:
            for batch in _batches(self._limited(self._texts(part))):
                output.write(self._encode(batch).tobytes())
        with _whole(index) as output:
            numpy.savez(output, allow_pickle=False, **self._arrays())

    def _texts(self, part: Slice) -> Iterator[str]:
        for piece in part.pieces:
            for text in read_piece(piece, self.settings.text_key):
                if isinstance(text, str):
                    yield text
                elif self.settings.skip_faults:
                    self.skipped += 1
                    if len(self.faults) < SHOWN_FAULTS:
                        self.faults.append(text.message(piece))
                else:
                    raise InputError(text.message(piece))

    def _limited(self, texts: Iterator[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the texts that are not blank, encoded too, to the first that exceeds the limit."""
        remaining = self.settings.max_bytes
        for text in texts:
            encoded = text.encode()
            if not text.strip():
                self.blank += 1
                continue
            yield text, encoded
            if remaining is not None and (remaining := remaining - len(encoded)) < 0:
                return

    def _encode(self, batch: list[tuple[str, bytes]]) -> NDArray:
        texts = [text for text, _ in batch]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        tokens: list[int] = []
        end = [] if self.settings.eod is None else [self.settings.eod]
        for (_, encoded), encoding in zip(batch, encodings, strict=True):
            before = len(tokens)
            tokens += encoding.ids
            tokens += end
            self.lengths.append(len(tokens) - before)
            self.nbytes.append(len(encoded))
            self.digests.append(hashlib.sha256(encoded).digest()[:16])
        return numpy.array(tokens, dtype=self.settings.dtype)

    def _arrays(self) -> dict[str, NDArray]:
        notes = {"blank": self.blank, "skipped": self.skipped, "faults": self.faults}
        digests = numpy.frombuffer(b"".join(self.digests), ">u8").astype(numpy.uint64).reshape(-1, 2)
        return {
            "lengths": numpy.array(self.lengths, numpy.int32),
            "nbytes": numpy.array(self.nbytes, numpy.int64),
            "digests": digests,
            "notes": numpy.frombuffer(json.dumps(notes).encode(), numpy.uint8),
        }


@cache
def _load(path: Path, split_special_tokens: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = split_special_tokens
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _batches(texts: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Gather texts until there are BATCH_DOCUMENTS of them or, for the sake of memory, many characters."""
    batch: list[tuple[str, bytes]] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text[0])
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
