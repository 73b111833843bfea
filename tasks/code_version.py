"""Which code this is: digests of our sources, versions of what is installed, commit and lock file."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import subprocess
from pathlib import Path
from typing import Any

# what computes in a job; the last one where there is a GPU
COMPUTING = ("torch", "megatron-core", "transformer-engine")
ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def source_digest(name: str) -> str:
    """Digest the sources of one of our packages or modules, given by dotted name, without importing it."""
    place = ROOT.joinpath(*name.split("."))
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@functools.cache
def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, from its metadata alone; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_record(sources: tuple[str, ...], distributions: tuple[str, ...]) -> dict[str, dict[str, str | None]]:
    """Return what identifies the code of a step in its fingerprint."""
    return {
        "sources": {name: source_digest(name)[:16] for name in sources},
        "versions": {name: installed_version(name) for name in distributions},
    }


@functools.cache
def code_version() -> dict[str, Any]:
    """Return commit, whether the working tree differs from it, digests of uv.lock and of our packages.

    `commit` and `modified` are None where the code does not lie in a git working tree.
    """
    lock = ROOT / "uv.lock"
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit,
        "modified": bool(_git("status", "--porcelain")) if commit else None,
        "lock_file_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None,
        "sources": {
            name: source_digest(name) for name in ("bridge", "training", "recipes", "tasks", "flows")
        },
        "versions": {
            name: installed_version(name)
            for name in (*COMPUTING, "transformers", "safetensors", "prefect", "mlflow")
        },
    }


def _git(*arguments: str) -> str | None:
    if not (ROOT / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
    return found.stdout.strip() if found.returncode == 0 else None
