"""An input cut into slices that workers tokenise apart from one another."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from training.corpus import TextFile
from training.documents import Piece, codec_suffix, format_of, open_bytes, row_groups

SLICE_BYTES = 16 << 20  # some seconds of work, which is what a killed build loses
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Slice:
    """Consecutive pieces of files; `key` names their content and the settings that their tokens depend on."""

    pieces: tuple[Piece, ...]
    key: str

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def pieces_of(file: TextFile, text_format: str | None, slice_bytes: int = SLICE_BYTES) -> list[Piece]:
    """Cut a file where it can be: JSONL after about `slice_bytes`, Parquet between its row groups."""
    kind = text_format or format_of(file.path)
    if kind == "parquet":
        count = row_groups(file.path)
        share = file.nbytes // max(count, 1)
        return [Piece(file.path, kind, number, number + 1, share) for number in range(count)]
    if kind == "jsonl" and not codec_suffix(file.path):
        starts = range(0, file.nbytes, slice_bytes)
        stops = [*starts, file.nbytes][1:]  # none of an empty file
        return [
            Piece(file.path, kind, start, stop, stop - start)
            for start, stop in zip(starts, stops, strict=True)
        ]
    return [Piece(file.path, kind, 0, None, file.nbytes)]


def cut(
    files: Iterable[TextFile], text_format: str | None, slice_bytes: int = SLICE_BYTES
) -> Iterator[tuple[Piece, ...]]:
    """Put the pieces of the files together to about `slice_bytes` each, in order."""
    gathered: list[Piece] = []
    for file in files:
        for piece in pieces_of(file, text_format, slice_bytes):
            if gathered and sum(each.nbytes for each in gathered) + piece.nbytes > slice_bytes:
                yield tuple(gathered)
                gathered = []
            gathered.append(piece)
    if gathered:
        yield tuple(gathered)


def keyed(pieces: tuple[Piece, ...], digests: dict[str, str], settings: str) -> Slice:
    """Name the content: `digests` are those of the files by path, `settings` that of all other influences."""
    content = [(digests[each.path], each.path, each.format, each.start, each.stop) for each in pieces]
    key = hashlib.sha256(json.dumps([settings, content]).encode()).hexdigest()[:32]
    return Slice(pieces, key)


def file_digest(path: str) -> str:
    """Return the SHA-256 of a file as stored, local or by URL."""
    digest = hashlib.sha256()
    with open_bytes(path) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
