"""Delivering a release to a folder or an S3 prefix, completely or not at all.

A folder is filled beside its place and renamed. On S3, release.json is written last and only where there is
none: a prefix without it is no release, and an interrupted upload goes on with the objects that are missing.
Each file is read against its digest: the store's may have changed since the gates saw it.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.errors import InputError
from tasks.address import Address, call, open_filesystem, parse_address
from tasks.artifact import FileEntry
from tasks.errors import ArtifactError, StoreError
from tasks.release import RELEASE, Release, parse_release
from tasks.spec import ReleaseSpec

# how long an upload may take at most: a start, and this many bytes a second
START_SECONDS, SLOWEST_BYTES_PER_SECOND = 300.0, 2_000_000
Progress = Callable[[int, int], None]


def resolve(destination: str, name: str, digest: str) -> Address:
    """Return the address of a release; `{name}` and `{digest}` (12 hex digits) may stand in `destination`."""
    text = destination.replace("{name}", name).replace("{digest}", digest[:12])
    if "{" in text or "}" in text:
        raise InputError(
            f"publish.destination {destination!r}: only {{name}} and {{digest}} may stand in braces"
        )
    address = parse_address(text)
    if address.scheme == "hf":
        raise InputError("publish.destination cannot be on the hub: give a folder or s3://bucket/prefix")
    return address


def check_destination(spec: ReleaseSpec) -> None:
    """Refuse, before any work, a destination that is taken, cannot be reached or needs credentials.

    A release of this very spec may lie there already, of a run that was killed late or changed nothing.
    """
    address = resolve(spec.publish.destination, spec.name, "0" * 64)
    if address.scheme == "s3":
        call(open_filesystem(address), "ls", address.path.partition("/")[0])
    present = read_release(address)
    if present and present.spec != spec.model_dump(mode="json"):
        raise InputError(_taken(address, present))
    if address.scheme == "file" and not present:
        _refuse_taken_folder(Path(address.path))


def read_release(address: Address) -> Release | None:
    """Return the release that lies at `address`, None if there is none or only a part of one."""
    filesystem = open_filesystem(address)
    place = address.join(RELEASE)
    if not call(filesystem, "exists", place):
        return None
    return parse_release(call(filesystem, "cat_file", place), f"{address}/{RELEASE}")


def deliver(
    release: Release, files: dict[str, Path], address: Address, *, on_progress: Progress | None = None
) -> None:
    """Write the release to `address`; one that is there already with the same digest is left as it is."""
    if present := read_release(address):
        if present.digest != release.digest:
            raise InputError(_taken(address, present))
        return
    write = _write_folder if address.scheme == "file" else _upload
    write(release, files, address, on_progress or (lambda done, total: None))


def _taken(address: Address, present: Release) -> str:
    return (
        f"{address} holds another release ({present.name}, digest {present.digest[:12]}), which is never"
        " overwritten: choose another publish.destination; with {digest} in it every release has its own"
    )


def _refuse_taken_folder(place: Path) -> None:
    if place.exists():
        raise InputError(f"{place} exists and is no release: choose another publish.destination or remove it")


def _write_folder(release: Release, files: dict[str, Path], address: Address, on_progress: Progress) -> None:
    place = Path(address.path)
    _refuse_taken_folder(place)
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    done = 0
    for entry in release.files:
        (partial / entry.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[entry.path], partial / entry.path)
        _check_digest(entry, partial / entry.path, files[entry.path])
        done += entry.bytes
        on_progress(done, release.bytes)
    (partial / RELEASE).write_text(release.to_json())
    partial.rename(place)


def _upload(release: Release, files: dict[str, Path], address: Address, on_progress: Progress) -> None:
    filesystem = open_filesystem(address)
    deadline = time.monotonic() + START_SECONDS + release.bytes / SLOWEST_BYTES_PER_SECOND
    present = _objects(filesystem, address)
    if foreign := sorted(present.keys() - files.keys()):
        raise InputError(
            f"{address} holds {foreign[0]!r}, which is not of this release:"
            " choose another publish.destination"
        )
    _abort_unfinished(filesystem, address)
    done = 0
    for entry in release.files:
        metadata = {"sha256": entry.sha256}
        place = address.join(entry.path)
        same_size = present.get(entry.path) == entry.bytes
        if not (same_size and call(filesystem, "metadata", place).get("sha256") == entry.sha256):
            _check_digest(entry, files[entry.path], files[entry.path])
            _put(filesystem, files[entry.path], place, deadline, Metadata=metadata)
        done += entry.bytes
        on_progress(done, release.bytes)
    # only where there is none: of two that publish at the same time one is told
    call(
        filesystem,
        "pipe_file",
        address.join(RELEASE),
        release.to_json().encode(),
        mode="create",
        timeout=_seconds_left(deadline),
    )


def _check_digest(entry: FileEntry, copy: Path, original: Path) -> None:
    with copy.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.sha256:
        raise ArtifactError(
            f"{original} has changed since it was made: its sha256 is {digest}, sealed was {entry.sha256};"
            " remove the folder of its artifact to make it anew"
        )


def _put(filesystem: Any, file: Path, place: str, deadline: float, **options: Any) -> None:
    left = _seconds_left(deadline)
    call(filesystem, "put_file", str(file), place, timeout=left, **options)


def _seconds_left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise StoreError(
            "the upload took too long and was given up; running again goes on with what is missing"
        )
    return left


def _objects(filesystem: Any, address: Address) -> dict[str, int]:
    found = call(filesystem, "find", address.path, detail=True)
    return {name.removeprefix(f"{address.path}/"): entry["size"] for name, entry in found.items()}


def _abort_unfinished(filesystem: Any, address: Address) -> None:
    """End the uploads that a killed attempt left half done below this prefix; they cost money unseen."""
    bucket, _, prefix = address.path.partition("/")
    found = call(filesystem, "call_s3", "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
    for upload in found.get("Uploads", []):
        names = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        call(filesystem, "call_s3", "abort_multipart_upload", **names)
