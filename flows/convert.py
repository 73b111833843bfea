"""`bridgeworks import` and `bridgeworks export`: conversions with progress, from folders and addresses.

Each imports its own half, and only when it runs: a small model is converted in less time than Python starts.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge.conversion import Conversion
from bridge.errors import InputError
from bridge.staging import SUFFIX
from flows.console import print_json, progress

FETCHED = ".bridgeworks.fetched"  # of a folder that is ours to remove: nobody else gives this name


def import_from(hf: str, megatron: Path, **options: Any) -> Conversion:
    """Import a checkpoint, with `import_checkpoint`'s options.

    One that is not in a folder here is fetched beside the result first.
    """
    from bridge.importer import import_checkpoint

    if "://" not in hf:
        _check_folder(hf)
        with _saying_how_to_go_on(megatron), progress("importing") as show:
            return import_checkpoint(hf, megatron, progress=show, **options)
    from tasks.fetch import fetch_checkpoint

    if os.path.lexists(megatron):
        raise InputError(f"{megatron} exists: choose another folder")
    fetched = megatron.with_name(megatron.name + FETCHED)
    with _saying_how_to_go_on(megatron, fetched):
        with progress("fetching") as show:
            fetch_checkpoint(hf, fetched / "checkpoint", on_progress=show)
        with progress("importing") as show:
            conversion = import_checkpoint(fetched / "checkpoint", megatron, progress=show, **options)
    shutil.rmtree(fetched)
    return conversion


def _check_folder(name: str) -> None:
    """Refuse a name of the hub without hf://, as transformers takes it."""
    if os.path.lexists(name):
        return
    from tasks.address import HUB_NAME

    if HUB_NAME.fullmatch(name.partition("@")[0]) and not name.startswith("."):
        raise InputError(f"no folder {name} here: for the model of this name on the hub give hf://{name}")


def export_to(megatron: Path, hf: Path, **options: Any) -> Conversion:
    """Export a checkpoint, with `export_checkpoint`'s options."""
    from bridge.exporter import export_checkpoint

    with _saying_how_to_go_on(hf), progress("exporting") as show:
        return export_checkpoint(megatron, hf, progress=show, **options)


def report(conversion: Conversion, json: bool) -> None:
    """Print what a conversion did."""
    if json:
        print_json(vars(conversion))
    else:
        print(
            f"{conversion.path}: {conversion.tensors} tensors, {conversion.bytes:,} bytes"
            f" in {conversion.seconds:.1f} s"
        )
        if conversion.resumed:
            print(f"{conversion.resumed:,} of the bytes were there from an interrupted conversion")
        if conversion.started_over:
            other = ", ".join(conversion.started_over)
            print(f"what an interrupted conversion had finished was not used: other {other}")
        if conversion.quantization:
            print(f"weights quantised by {conversion.quantization} were written as what they stand for")


@contextmanager
def _saying_how_to_go_on(result: Path, *others: Path) -> Iterator[None]:
    """Name the folders that Ctrl-C or SIGTERM leaves."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        left = [path for path in (result.with_name(result.name + SUFFIX), *others) if path.is_dir()]
        if left:
            names = " and ".join(map(str, left))
            print(f"stopped: the same command goes on from {names}; remove it if not wanted", file=sys.stderr)
        raise
