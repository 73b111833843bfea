"""What the command shows: tables and progress bars when a person watches, plain lines otherwise."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bridge.job import finite

PLAIN_SECONDS = 10.0  # between two lines of progress in a log
Progress = Callable[[float, float], None]


def person_watches() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()


def print_json(value: Any) -> None:
    """Print one JSON document for a script."""
    print(json.dumps(finite(value), indent=1, sort_keys=True, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "") -> None:
    """Print rows under headings; in a log, in columns of spaces that are never cut or wrapped."""
    if not person_watches():
        _print_columns(columns, rows, title)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title or None, title_justify="left", title_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*map(_styled, row))
    Console().print(table)


def _print_columns(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str) -> None:
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if title:
        print(title)
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _styled(cell: Any) -> Any:
    from rich.text import Text

    styles = {"passed": "green", "done": "green", "ok": "green", "reused": "cyan", "reuse": "cyan"}
    styles |= {"FAILED": "bold red", "missing": "bold red", "run": "yellow", "warning": "yellow"}
    return Text(str(cell), style=styles.get(str(cell), ""))


@contextmanager
def progress(description: str) -> Iterator[Progress]:
    """Yield a function that is told (done, total) and shows a bar on stderr, or a line every ten seconds."""
    if not person_watches():
        yield _Lines(description)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    def __init__(self, description: str) -> None:
        self.description, self.last = description, time.monotonic()

    def __call__(self, done: float, total: float) -> None:
        if time.monotonic() - self.last >= PLAIN_SECONDS:
            self.last = time.monotonic()
            print(f"{self.description}: {done / max(total, 1):.0%}", file=sys.stderr, flush=True)
