"""Checking a release where it lies, a folder or an S3 prefix, against what its release.json says."""

import hashlib
from typing import Any

from tasks.address import Address, call, open_filesystem, parse_address
from tasks.delivery import read_release
from tasks.errors import ArtifactError
from tasks.plan import flatten
from tasks.release import RELEASE, Release

CHUNK_BYTES = 16 << 20


def open_release(text: str) -> tuple[Address, Release]:
    """Return the address and the release.json of the release at `text`."""
    address = parse_address(text)
    release = read_release(address)
    if release is None:
        raise ArtifactError(
            f"{address} has no {RELEASE}: it is not a release, or one that was never completed"
        )
    return address, release


def verify_release(text: str) -> list[str]:
    """Read every file again and return what is wrong, one line each: missing, changed and extra files."""
    address, release = open_release(text)
    filesystem = open_filesystem(address)
    found = call(filesystem, "find", address.path, detail=True)
    sizes = {name.removeprefix(f"{address.path}/"): entry["size"] for name, entry in found.items()}
    problems = [f"{name}: not in {RELEASE}" for name in sorted(sizes.keys() - _listed(release))]
    for entry in release.files:
        if entry.path not in sizes:
            problems.append(f"{entry.path}: missing")
        elif sizes[entry.path] != entry.bytes:
            problems.append(f"{entry.path}: {sizes[entry.path]} bytes instead of {entry.bytes}")
        elif (digest := _digest(filesystem, address.join(entry.path), entry.bytes)) != entry.sha256:
            problems.append(f"{entry.path}: sha256 {digest} instead of {entry.sha256}")
    return problems


def _listed(release: Release) -> set[str]:
    return {entry.path for entry in release.files} | {RELEASE}


def _digest(filesystem: Any, place: str, size: int) -> str:
    digest = hashlib.sha256()
    for begin in range(0, size, CHUNK_BYTES):
        end = min(begin + CHUNK_BYTES, size)
        digest.update(call(filesystem, "cat_file", place, start=begin, end=end))
    return digest.hexdigest()


def diff_releases(first: Release, second: Release) -> list[tuple[str, str, str]]:
    """Return (name, value in the first, value in the second) of everything that two releases differ in."""
    before, after = _comparable(first), _comparable(second)
    names = sorted(before.keys() | after.keys())
    return [
        (name, str(before.get(name, "")), str(after.get(name, "")))
        for name in names
        if before.get(name) != after.get(name)
    ]


def _comparable(release: Release) -> dict[str, Any]:
    """Flatten a release to dotted names; files by path, without what differs between any two runs."""
    value = release.model_dump(mode="json", exclude={"created", "identifiers", "steps", "files"})
    files = {f"files.{entry.path}": entry.sha256 for entry in release.files}
    return {**flatten(value), **files}
