"""A progress bar for long work in Python, for a person who watches."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bridge.byte_copy import Progress


@contextmanager
def progress_bar(description: str, progress: Progress | None = None) -> Iterator[Progress | None]:
    """Yield `progress`, or else a function of (done, total) that shows a bar where stderr is a terminal."""
    if progress or not sys.stderr.isatty():
        yield progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
