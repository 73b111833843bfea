"""The documents of one piece of an input file, and what is wrong with those that cannot be used."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from bridge.errors import InputError

FORMATS = ("jsonl", "parquet", "text")
CODECS = {".gz": "gzip", ".zst": "zstd"}
READ_BYTES = 1 << 20
ROWS = 1024  # of a Parquet file at a time


@dataclass(frozen=True)
class Piece:
    """A part of an input file: the JSONL lines that begin in these bytes, these row groups of Parquet.

    `stop` None means to the end; text and compressed files are read whole. `nbytes` is what it takes of the
    file.
    """

    path: str
    format: str
    start: int
    stop: int | None
    nbytes: int


@dataclass(frozen=True)
class Fault:
    """A document that cannot be used: line, row or (0) file, counted from 1 within its piece, and why."""

    number: int
    reason: str

    def message(self, piece: Piece) -> str:
        """Say where the document is, counted from the beginning of the file."""
        if not self.number:
            return f"{piece.path}: {self.reason}"
        unit = "row" if piece.format == "parquet" else "line"
        return f"{piece.path}, {unit} {_before(piece) + self.number}: {self.reason}"


def format_of(path: str) -> str:
    """Return the format that a file's name tells."""
    suffix = Path(path.removesuffix(codec_suffix(path))).suffix
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}.get(
        suffix, "text"
    )


def codec_suffix(path: str) -> str:
    """Return the suffix that tells how a file is compressed, or nothing."""
    return suffix if (suffix := Path(path).suffix) in CODECS else ""


def read_piece(piece: Piece, text_key: str) -> Iterator[str | Fault]:
    """Yield the documents of a piece in order, and a Fault in the place of each that cannot be used.

    A file that cannot be read at all is an InputError that names it.
    """
    readers = {"jsonl": _jsonl, "parquet": _parquet, "text": _text}
    try:
        yield from readers[piece.format](piece, text_key)
    except (OSError, EOFError) as error:  # pyarrow's are OSErrors
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read {piece.path} as {piece.format}: {reason}") from error


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Open a file as stored, local or by URL."""
    if "://" in path:
        import fsspec

        with fsspec.open(path, "rb") as remote:
            yield remote
    else:
        with Path(path).open("rb") as file:
            yield file


@contextmanager
def _open_text(path: str) -> Iterator[IO[bytes]]:
    """Open a file unpacked."""
    with open_bytes(path) as file:
        if suffix := codec_suffix(path):
            import pyarrow

            # unlike gzip.open it knows Zstandard, and its inflation is three times as fast
            unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), CODECS[suffix])
            file = cast(IO[bytes], io.BufferedReader(unpacked, READ_BYTES))
        yield file


def _jsonl(piece: Piece, text_key: str) -> Iterator[str | Fault]:
    with _open_text(piece.path) as file:
        position = _first_line(file, piece.start) if piece.start else 0
        number = 0
        while (piece.stop is None or position < piece.stop) and (line := file.readline()):
            position += len(line)
            number += 1
            if line.strip():
                yield _text_of(line, number, text_key)


def _first_line(file: IO[bytes], start: int) -> int:
    """Go to the first line that begins at `start` or later and return its place."""
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _text_of(line: bytes, number: int, text_key: str) -> str | Fault:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Fault(number, f"is not UTF-8 ({error.reason} at byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        return Fault(number, f"is no JSON ({error})")
    if not isinstance(value, dict) or text_key not in value:
        keys = f"an object with {', '.join(map(repr, list(value)[:8]))}" if isinstance(value, dict) else ""
        found = keys or f"{type(value).__name__}"
        return Fault(number, f'expected a JSON object with a "{text_key}" key, got {found}')
    return _checked(value[text_key], number, text_key)


def _checked(text: Any, number: int, text_key: str) -> str | Fault:
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        return Fault(number, f'"{text_key}" is {kind}, expected a string')
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
            return Fault(number, f'"{text_key}" holds a lone surrogate at character {error.start}')
    return text


def _parquet(piece: Piece, text_key: str) -> Iterator[str | Fault]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    with open_bytes(piece.path) as source:
        try:
            file = parquet.ParquetFile(source)
        except pyarrow.ArrowInvalid as error:
            raise OSError(str(error)) from error
        if text_key not in file.schema_arrow.names:
            raise InputError(
                f'{piece.path} has no column "{text_key}": its columns are'
                f" {', '.join(file.schema_arrow.names)}; name one by --text-key"
            )
        groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
        for batch in file.iter_batches(ROWS, row_groups=list(groups), columns=[text_key]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield _checked(text, number, text_key)


def row_groups(path: str) -> int:
    """Return the number of row groups of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with open_bytes(path) as source:
            return parquet.ParquetFile(source).num_row_groups
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise InputError(f"cannot read {path} as parquet: {' '.join(str(error).split())}") from error


def _text(piece: Piece, text_key: str) -> Iterator[str | Fault]:
    with _open_text(piece.path) as file:
        try:
            text = file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            yield Fault(0, f"is not UTF-8 text ({error.reason} at byte {error.start})")
            return
    if text.strip():
        yield text


def _before(piece: Piece) -> int:
    """Count the lines or rows of the file before those of `piece`."""
    if not piece.start:
        return 0
    with open_bytes(piece.path) as file:
        if piece.format == "parquet":
            from pyarrow import parquet

            metadata = parquet.ParquetFile(file).metadata
            return sum(metadata.row_group(number).num_rows for number in range(piece.start))
        left, lines = _first_line(file, piece.start), 0
        file.seek(0)
        while left:
            block = file.read(min(left, READ_BYTES))
            left -= len(block)
            lines += block.count(b"\n")
        return lines
