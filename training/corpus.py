"""Text documents from files and folders, in an order that every machine repeats."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bridge.errors import InputError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")


@dataclass
class Corpus:
    """Documents below `inputs`: a `.jsonl` file has one a line under "text", any other file is one.

    A folder gives its files with a suffix of TEXT_SUFFIXES, without files and folders named in `exclude`, in
    sorted order; reading stops before the document that would exceed `max_bytes`.
    """

    inputs: list[str]
    exclude: list[str] = field(default_factory=list)
    max_bytes: int | None = None

    def documents(self) -> Iterator[str]:
        """Yield the documents; a path that is missing or holds no UTF-8 text is an InputError."""
        remaining = self.max_bytes
        for path in self.files():
            for text in _read(path):
                if remaining is not None:
                    remaining -= len(text.encode())
                    if remaining < 0:
                        return
                yield text

    def files(self) -> Iterator[Path]:
        """Yield the files that the documents are read from."""
        for given in map(Path, self.inputs):
            if given.is_file():
                yield given
            elif given.is_dir():
                yield from self._below(given)
            else:
                raise InputError(f"no such text file or folder: {given}")

    def _below(self, folder: Path) -> Iterator[Path]:
        for current, folders, names in os.walk(folder):
            folders[:] = sorted(set(folders) - set(self.exclude))
            for name in sorted(names):
                if name.endswith(TEXT_SUFFIXES) and name not in self.exclude:
                    yield Path(current, name)


def _read(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (
                    _text_of(path, number, line) for number, line in enumerate(lines, 1) if line.strip()
                )
        elif (text := path.read_text(encoding="utf-8")).strip():
            yield text
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path}, line {number}: expected a JSON object with a "text" key') from error
    if not isinstance(text, str):
        raise InputError(f'{path}, line {number}: "text" is {type(text).__name__}, expected a string')
    return text
