"""Paths that stay inside the folder that names them."""

from pathlib import Path

from bridge.errors import CheckpointError


def contained_file(folder: Path, name: str, named_by: Path) -> Path:
    """Return `folder/name`, an existing file inside `folder`; `named_by` is the file that gave the name.

    A symbolic link may lead only to a file of the same folder, or, in a snapshot of the Hugging Face cache,
    to that cache's own blobs.
    """
    if not name or Path(name).name != name:
        raise CheckpointError(f"{named_by} names {name!r}: only files of its own folder are allowed")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{named_by} names {name!r}, but {path} does not exist: fetch it again")
    check_contained(folder, path)
    return path


def check_contained(folder: Path, path: Path) -> None:
    """Refuse a file of `folder` that is a link to somewhere else."""
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in _allowed_roots(folder)):
        raise CheckpointError(f"{path} is a link to {real}, outside its folder: copy the file here instead")


def _allowed_roots(folder: Path) -> list[Path]:
    real = folder.resolve()
    # huggingface_hub lays out models--ORG--NAME/{blobs,snapshots/REVISION}; a snapshot is links to blobs.
    return [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]
