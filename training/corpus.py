"""Text documents from files, folders, globs and URLs, in an order that every machine repeats."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.errors import BridgeworksError, InputError
from training.documents import FORMATS, Fault, Piece, format_of, read_piece

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson", ".parquet")
COMPRESSED_SUFFIXES = (".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst", ".txt.gz", ".txt.zst")
HTTP_VERSIONS = ("ETag", "Content-MD5", "Last-Modified")


@dataclass(frozen=True)
class TextFile:
    """One input file; `stamp` changes when it is written again."""

    path: str
    nbytes: int
    stamp: str


@dataclass
class Corpus:
    """Documents of `inputs`: lines of JSONL and rows of Parquet under `text_key`, any other file is one.

    A folder gives its files with a known suffix, without files and folders named in `exclude`, in sorted
    order, and so does a glob; an input with :// is read through fsspec. `format` is one of FORMATS, None goes
    by the suffix. Reading stops before the document that would exceed `max_bytes` of text.
    """

    inputs: list[str]
    exclude: list[str] = field(default_factory=list)
    max_bytes: int | None = None
    text_key: str = "text"
    format: str | None = None

    def __post_init__(self) -> None:
        if self.format not in (None, *FORMATS):
            raise InputError(f"format is {self.format!r}: allowed are {', '.join(FORMATS)}")

    def documents(self) -> Iterator[str]:
        """Yield the documents one after the other; the first that cannot be used is an InputError."""
        remaining = self.max_bytes
        for file in self.files():
            piece = Piece(file.path, self.format or format_of(file.path), 0, None, file.nbytes)
            for text in read_piece(piece, self.text_key):
                if isinstance(text, Fault):
                    raise InputError(text.message(piece))
                if remaining is not None and (remaining := remaining - len(text.encode())) < 0:
                    return
                if text.strip():
                    yield text

    def files(self) -> Iterator[TextFile]:
        """Yield the files that the documents are read from; an input that names none is an InputError."""
        for given in self.inputs:
            found = list(self._remote(given) if "://" in given else self._local(given))
            if not found:
                raise InputError(
                    f"no text below {given}: expected files that end in"
                    f" {', '.join((*TEXT_SUFFIXES, *COMPRESSED_SUFFIXES))}"
                )
            yield from found

    def _local(self, given: str) -> Iterator[TextFile]:
        path = Path(given)
        if path.is_dir():
            yield from map(_local_file, self._below(path))
        elif path.is_file():
            yield _local_file(path)
        elif matches := sorted(glob.glob(given, recursive=True)):  # noqa: PTH207 - Path.glob is relative
            yield from map(_local_file, filter(self._wanted, filter(Path.is_file, map(Path, matches))))
        else:
            raise InputError(f"no such text file or folder: {given}")

    def _below(self, folder: Path) -> Iterator[Path]:
        for current, folders, names in os.walk(folder):
            folders[:] = sorted(set(folders) - set(self.exclude))
            for name in sorted(names):
                if name.endswith((*TEXT_SUFFIXES, *COMPRESSED_SUFFIXES)) and name not in self.exclude:
                    yield Path(current, name)

    def _wanted(self, path: Path) -> bool:
        return not set(path.parts) & set(self.exclude)

    def _remote(self, given: str) -> list[TextFile]:
        if re.match(r"[^/]*://[^/]*@", given):
            raise InputError(
                "an address of text may hold no user or password: give credentials by the environment, or"
                " fetch the text first"
            )
        try:
            return list(self._below_address(given))
        except InputError:
            raise
        except Exception as error:  # each kind of store raises what its own library does
            raise _unusable(given, error) from error

    def _below_address(self, given: str) -> Iterator[TextFile]:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(given)
        if glob.has_magic(path):
            matches = sorted(filter(filesystem.isfile, filesystem.glob(path)))
        elif filesystem.isdir(path):
            suffixes = (*TEXT_SUFFIXES, *COMPRESSED_SUFFIXES)
            matches = sorted(name for name in filesystem.find(path) if name.endswith(suffixes))
        elif filesystem.isfile(path):
            matches = [path]
        else:
            raise InputError(f"no such text file or folder: {given}")
        yield from (_remote_file(filesystem, match) for match in matches if self._wanted(Path(match)))


def _local_file(path: Path) -> TextFile:
    state = path.stat()
    return TextFile(str(path), state.st_size, str(state.st_mtime_ns))


def _remote_file(filesystem: Any, path: str) -> TextFile:
    about = filesystem.info(path)
    # of a URL, fsspec's own key is the URL alone
    versions = [str(about[name]) for name in HTTP_VERSIONS if name in about]
    stamp = " ".join([str(filesystem.ukey(path)), *versions])
    return TextFile(filesystem.unstrip_protocol(path), int(about["size"] or 0), stamp)


def _unusable(given: str, error: Exception) -> BridgeworksError:
    text = " ".join(str(error).split())[:300]
    message = f"cannot read text at {given}: {type(error).__name__}: {text}"
    wrong = isinstance(error, ImportError | ValueError | FileNotFoundError | PermissionError)
    return InputError(message) if wrong else BridgeworksError(message)
