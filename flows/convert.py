"""`bridgeworks import` and `bridgeworks export`: conversions with progress, from folders and addresses.

Each imports its own half, and only when it runs: a small model is converted in less time than Python starts.
"""

import shutil
from pathlib import Path
from typing import Any

from bridge.conversion import Conversion
from bridge.errors import InputError
from flows.console import progress


def import_from(hf: str, megatron: Path, **options: Any) -> Conversion:
    """Import a checkpoint, with `import_checkpoint`'s options.

    One that is not in a folder here is fetched beside the result first.
    """
    from bridge.importer import import_checkpoint

    if "://" not in hf:
        with progress("importing") as show:
            return import_checkpoint(hf, megatron, progress=show, **options)
    from tasks.fetch import fetch_checkpoint

    if megatron.exists():
        raise InputError(f"{megatron} exists: choose another folder")
    fetched = megatron.with_name(f"{megatron.name}.fetched")
    with progress("fetching") as show:
        fetch_checkpoint(hf, fetched / "checkpoint", on_progress=show)
    with progress("importing") as show:
        conversion = import_checkpoint(fetched / "checkpoint", megatron, progress=show, **options)
    shutil.rmtree(fetched)
    return conversion


def export_to(megatron: Path, hf: Path, **options: Any) -> Conversion:
    """Export a checkpoint, with `export_checkpoint`'s options."""
    from bridge.exporter import export_checkpoint

    with progress("exporting") as show:
        return export_checkpoint(megatron, hf, progress=show, **options)
