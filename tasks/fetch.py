"""Fetching a checkpoint from a folder, S3 or the Hugging Face hub into a local folder, resumable and pinned.

Only what a conversion reads is copied: config, tokenizer, licence, safetensors shards; no pickles, no code.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.contained_path import check_contained
from bridge.errors import CheckpointError, InputError
from bridge.families import provider_of
from bridge.hf_checkpoint import CONFIG, INDEX, SINGLE_SHARD, HfCheckpoint, is_side_file, read_config
from bridge.job import write_json
from tasks.address import COMMIT, Address, call, explain, open_filesystem, parse_address, remote_errors
from tasks.errors import StoreError

CHUNK_BYTES = 16 << 20
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file as its store describes it; `version` changes whenever the content does."""

    bytes: int
    version: str
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint at an address whose revision is pinned, with its files by name."""

    address: Address
    files: dict[str, RemoteFile]

    @property
    def identity(self) -> dict[str, Any]:
        files = {name: [file.bytes, file.version] for name, file in sorted(self.files.items())}
        return {"uri": str(self.address), "files": files}


def identify(uri: str) -> dict[str, Any]:
    """Say which checkpoint `uri` means right now, without reading its weights.

    A hub address that names a commit is its own identity and needs no network. A folder is checked here, so
    that a wrong one is refused before anything is written.
    """
    address = pin(parse_address(uri))
    if address.scheme == "hf":
        return {"uri": str(address)}
    identity = survey(address).identity
    if address.scheme == "file":
        provider_of(HfCheckpoint.open(address.path).config)
    return identity


def pin(address: Address) -> Address:
    """Return a hub address with its branch or tag replaced by the commit that it names."""
    if address.scheme != "hf" or COMMIT.fullmatch(address.revision or ""):
        return address
    return Address("hf", address.path, _hub_info(address).sha)


def survey(address: Address) -> Source:
    """List the files of a checkpoint that may be fetched."""
    address = pin(address)
    listing = {"file": _list_folder, "s3": _list_bucket, "hf": _list_hub}[address.scheme](address)
    files = {name: file for name, file in listing.items() if may_fetch(name)}
    if CONFIG not in files:
        raise InputError(f"{address} has no {CONFIG}: give the address of a Hugging Face checkpoint")
    return Source(address, files)


def may_fetch(name: str) -> bool:
    """Tell whether a file of this name is weights, config or tokenizer; subfolders are left alone."""
    weights = name in (CONFIG, INDEX) or name.endswith(".safetensors")
    return "/" not in name and (weights or is_side_file(name))


def fetch_checkpoint(
    uri: str, destination: Path, *, on_progress: Progress | None = None, workers: int = 4
) -> dict[str, Any]:
    """Copy the checkpoint at `uri` to `destination` and return where it came from.

    What an interrupted call has copied is kept, by file and by range, as long as the source has not changed.
    `on_progress(bytes_done, bytes_total)` is called in the calling thread. The config is checked before any
    weights are fetched, the shards' headers after.
    """
    source = survey(parse_address(uri))
    _claim(destination, source)
    small = [name for name in source.files if not name.endswith(".safetensors")]
    _copy(source, small, destination, None, workers)
    provider_of(read_config(destination))
    shards = choose_shards(source, destination)
    _check_space(source, shards, destination)
    _copy(source, shards, destination, on_progress, workers)
    if survey(source.address).identity != source.identity:
        raise StoreError(f"{source.address} changed while it was being fetched: fetch it again")
    HfCheckpoint.open(destination)
    return {
        "uri": str(source.address),
        "revision": source.address.revision,
        "trust_remote_code": False,
        "bytes": sum(source.files[name].bytes for name in small + shards),
        "versions": {name: source.files[name].version for name in sorted(small + shards)},
    }


def choose_shards(source: Source, destination: Path) -> list[str]:
    """Return the weight files that transformers would read, of a source whose index has been fetched."""
    if SINGLE_SHARD in source.files:
        return [SINGLE_SHARD]
    if INDEX not in source.files:
        raise CheckpointError(f"{source.address} has no safetensors weights: other formats are not read")
    try:
        shards = set(json.loads((destination / INDEX).read_text())["weight_map"].values())
        if missing := sorted(shards - set(source.files)):
            raise CheckpointError(f"{source.address}: {INDEX} names {missing[0]!r}, which is not there")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{source.address}: {INDEX} has no 'weight_map' of tensor names to files"
        ) from error
    return sorted(shards)


def _claim(destination: Path, source: Source) -> None:
    """Empty the folder unless it was begun from exactly this source; the note beside it says from which."""
    note = destination.with_name(f"{destination.name}.source.json")
    if not note.is_file() or json.loads(note.read_text()) != source.identity:
        shutil.rmtree(destination, ignore_errors=True)
        destination.mkdir(parents=True)
        write_json(note, source.identity)


def _check_space(source: Source, names: list[str], destination: Path) -> None:
    needed = sum(source.files[name].bytes for name in names if not (destination / name).exists())
    needed -= sum(part.stat().st_size for part in destination.glob("*.part"))
    free = shutil.disk_usage(destination).free
    if needed > free:
        raise InputError(
            f"{destination} has {free:,} bytes free, {source.address} needs {needed:,} more: make room"
        )


def _copy(
    source: Source, names: list[str], destination: Path, on_progress: Progress | None, workers: int
) -> None:
    total = sum(source.files[name].bytes for name in names)
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=workers) as threads:
        pending = {threads.submit(_copy_file, source, name, destination, stop) for name in names}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when="FIRST_EXCEPTION")
                if on_progress:
                    on_progress(_bytes_present(destination, names), total)
                for future in done:
                    future.result()
        finally:
            stop.set()  # one failed, or the caller was told to stop: the others end after their chunk


def _bytes_present(destination: Path, names: list[str]) -> int:
    candidates = [destination / f"{name}{suffix}" for name in names for suffix in ("", ".part")]
    return sum(path.stat().st_size for path in candidates if path.exists())


def _copy_file(source: Source, name: str, destination: Path, stop: threading.Event) -> None:
    """Append what is missing to `name.part`, then give it its name."""
    remote, final = source.files[name], destination / name
    if final.is_file() and final.stat().st_size == remote.bytes:
        return
    part = destination / f"{name}.part"
    filesystem = open_filesystem(source.address)
    # a cache that reads ahead would fetch most bytes twice
    options: dict[str, Any] = {"cache_type": "none"} if source.address.scheme == "hf" else {}
    with part.open("ab") as file:
        while (begin := file.tell()) < remote.bytes and not stop.is_set():
            end = min(begin + CHUNK_BYTES, remote.bytes)
            chunk = call(filesystem, "cat_file", source.address.join(name), start=begin, end=end, **options)
            if len(chunk) != end - begin:
                raise StoreError(
                    f"{source.address}: {name} ended at byte {begin + len(chunk)} of {remote.bytes}"
                )
            file.write(chunk)
    if part.stat().st_size == remote.bytes:
        _check_digest(source, name, part)
        part.rename(final)
    elif not stop.is_set():
        part.unlink()
        raise StoreError(f"{source.address}: {name} has another size than before: fetch it again")


def _check_digest(source: Source, name: str, part: Path) -> None:
    expected = source.files[name].sha256
    with part.open("rb") as file:
        if expected and hashlib.file_digest(file, "sha256").hexdigest() != expected:
            part.unlink()
            raise StoreError(f"{source.address}: {name} does not have its sha256 {expected}: fetch it again")


def _list_folder(address: Address) -> dict[str, RemoteFile]:
    folder = Path(address.path)
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    files = [path for path in folder.iterdir() if path.is_file() and may_fetch(path.name)]
    for path in files:
        check_contained(folder, path)
    return {
        path.name: RemoteFile(path.stat().st_size, f"mtime {path.stat().st_mtime_ns}")
        for path in sorted(files)
    }


def _list_bucket(address: Address) -> dict[str, RemoteFile]:
    entries = call(open_filesystem(address), "ls", address.path, detail=True)
    return {
        entry["name"].removeprefix(f"{address.path}/"): RemoteFile(
            entry["size"], f"etag {entry['ETag'].strip(chr(34))}"
        )
        for entry in entries
        if entry["type"] == "file"
    }


def _list_hub(address: Address) -> dict[str, RemoteFile]:
    return {
        each.rfilename: RemoteFile(each.size, f"blob {each.blob_id}", each.lfs.sha256 if each.lfs else None)
        for each in _hub_info(address, files_metadata=True).siblings
    }


def _hub_info(address: Address, **options: Any) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().model_info(address.path, revision=address.revision, **options)
    except RevisionNotFoundError as error:
        raise InputError(f"hf://{address.path} has no revision {address.revision!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"no model hf://{address.path} on the hub, or no permission: set HF_TOKEN"
        ) from error
    except remote_errors() as error:
        raise explain(error, str(address)) from error
