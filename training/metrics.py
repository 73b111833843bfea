"""The metrics file of a run: one JSON object a line, only ever appended to, readable at any time."""

import json
import time
from pathlib import Path
from typing import Any


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    """Append one line in one write, so that a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps({**line, "time": time.time()}).encode() + b"\n")


def close_torn_line(path: Path) -> None:
    """End a line that a killed run left unfinished, so that the next one starts on its own."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return one record per iteration in order, with what a resumed run repeated taken from its last pass.

    A `resumed_at` line takes back everything after that iteration. A line that is not whole, because its
    writer was killed or is still writing, is no record.
    """
    records: dict[int, dict[str, Any]] = {}
    for line in _whole_lines(Path(path)):
        if "resumed_at" in line:
            records = {number: record for number, record in records.items() if number <= line["resumed_at"]}
        elif "iteration" in line:
            records.setdefault(line["iteration"], {}).update(line)
    return [records[number] for number in sorted(records)]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
