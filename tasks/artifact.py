"""Artifacts: sealed directories that say what went in and what came out, and the store that keeps them.

An artifact lies at `STORE/STEP/FINGERPRINT/`. It is filled in `FINGERPRINT.partial/` beside that place, gets
its `artifact.json` last and is then renamed: what has an `artifact.json` under its final name is complete.

    store = Store(workspace / "store")
    artifact = store.build("import", Kind.MEGATRON_CHECKPOINT, record, fill, name=spec.name)
    artifact.payload        # the folder (or file) that the next step reads
    artifact.digest         # of the payload's content; goes into the records of later steps
    artifact.output         # the small JSON that `fill(folder)` returned
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bridge.job import write_json
from tasks.errors import ArtifactError

SEAL = "artifact.json"
NAME_LENGTH = 16  # hex digits of the fingerprint in a folder's name; the seal holds all 64


class Kind(StrEnum):
    """What an artifact's payload is; each kind keeps it under a name of its own."""

    SOURCE = "source"
    MEGATRON_CHECKPOINT = "megatron_checkpoint"
    DATASET = "dataset"
    TRAINING_RUN = "training_run"
    HF_CHECKPOINT = "hf_checkpoint"
    GATE_REPORT = "gate_report"
    RELEASE = "release"


PAYLOADS = {
    Kind.SOURCE: "checkpoint",
    Kind.MEGATRON_CHECKPOINT: "checkpoint",
    Kind.DATASET: "dataset",
    Kind.TRAINING_RUN: "checkpoints",
    Kind.HF_CHECKPOINT: "checkpoint",
    Kind.GATE_REPORT: "report.json",
    Kind.RELEASE: "release",
}


class FileEntry(BaseModel):
    """One file of an artifact; `path` is relative to the artifact's folder, with forward slashes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    bytes: int
    sha256: str


class Artifact(BaseModel):
    """A sealed directory: what its artifact.json says, and where it lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    step: str
    kind: Kind
    # sha256 of `record`: what went in
    fingerprint: str
    record: dict[str, Any]
    # sha256 over the payload's paths and contents: what came out
    digest: str
    files: tuple[FileEntry, ...]
    output: dict[str, Any]
    provenance: dict[str, Any]
    path: Path = Field(exclude=True)

    @property
    def payload(self) -> Path:
        """The folder or file that a later step reads."""
        return self.path / PAYLOADS[self.kind]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)

    def problem(self) -> str | None:
        """Say which file is missing or of another size; looks at no content."""
        for entry in self.files:
            file = self.path / entry.path
            if not file.is_file():
                return f"file {entry.path} is missing"
            if (size := file.stat().st_size) != entry.bytes:
                return f"file {entry.path} has {size} bytes instead of {entry.bytes}"
        return None

    def verify(self) -> None:
        """Read every file again and raise ArtifactError if one is not what was sealed."""
        if problem := self.problem():
            raise ArtifactError(f"{self.path}: {problem}")
        found = {entry.path: entry for entry in list_files(self.path)}
        for sealed in self.files:
            if found[sealed.path] != sealed:
                raise ArtifactError(
                    f"{self.path}: file {sealed.path} has sha256 {found[sealed.path].sha256},"
                    f" sealed was {sealed.sha256}"
                )


def fingerprint(record: dict[str, Any]) -> str:
    """Return the sha256 of a record's canonical JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def list_files(folder: Path) -> list[FileEntry]:
    """List and digest every file below `folder` in the order of their paths, the seal excepted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(lambda path: _entry(folder, path), paths))


def _entry(folder: Path, path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=digest)


def payload_digest(kind: Kind, files: list[FileEntry]) -> str:
    """Digest the payload's files; notes and metrics that lie beside it do not change it."""
    name = PAYLOADS[kind]
    inside = [entry for entry in files if entry.path == name or entry.path.startswith(f"{name}/")]
    if not inside:
        raise ArtifactError(f"an artifact of kind {kind} needs a payload called {name!r}; there is none")
    return fingerprint({entry.path: entry.sha256 for entry in inside})


def load_artifact(folder: Path) -> Artifact:
    """Read a sealed directory's artifact.json; ArtifactError if there is none or it is not one of ours."""
    try:
        return Artifact(**json.loads((folder / SEAL).read_text()), path=folder)
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise ArtifactError(
            f"{folder} is not a sealed artifact: {' '.join(str(error).split())};"
            " remove the folder to build it again"
        ) from error


class Store:
    """The artifacts of a workspace, found by step and fingerprint."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, step: str, record: dict[str, Any]) -> Path:
        """Return the folder where the artifact with this record lies or would lie."""
        return self.root / step / fingerprint(record)[:NAME_LENGTH]

    def find(self, step: str, record: dict[str, Any]) -> Artifact | None:
        """Return the sealed artifact that was built from exactly this record, complete or not."""
        place = self.place(step, record)
        if not (place / SEAL).is_file():
            return None
        artifact = load_artifact(place)
        return artifact if artifact.fingerprint == fingerprint(record) else None

    def newest(self, step: str, name: str) -> Artifact | None:
        """Return the artifact of this step that the release called `name` built last."""
        seals = sorted(
            self.root.glob(f"{step}/*/{SEAL}"), key=lambda path: path.stat().st_mtime, reverse=True
        )
        sealed = (load_artifact(path.parent) for path in seals if not path.parent.suffix)
        return next((artifact for artifact in sealed if artifact.provenance.get("name") == name), None)

    def build(
        self,
        step: str,
        kind: Kind,
        record: dict[str, Any],
        fill: Callable[[Path], dict[str, Any]],
        *,
        name: str,
        provenance: Callable[[], dict[str, Any]] = dict,
        resumable: bool = False,
        rebuild: bool = False,
        on_wait: Callable[[Path], None] | None = None,
    ) -> Artifact:
        """Let `fill` fill a folder, seal it and return it; what `fill` returns becomes the artifact's output.

        A second process that wants the same artifact waits (`on_wait` is called about twice a second and may
        raise) and gets the first one's. A resumable step finds what a killed attempt left in its folder, any
        other starts empty. When `fill` raises, the partial folder stays for a look and is never taken for a
        result; `provenance` is asked after it. `rebuild` replaces an artifact that is there.
        """
        place = self.place(step, record)
        with _locked(place.with_suffix(".lock"), on_wait):
            found = None if rebuild else self.find(step, record)
            if found and not found.problem():
                return found
            partial = place.with_suffix(".partial")
            if not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            output = fill(partial)
            about = {**provenance(), "name": name, "seconds": round(time.monotonic() - started, 3)}
            _seal(partial, step, kind, record, output, about)
            return _move(partial, place)


@contextmanager
def _locked(path: Path, on_wait: Callable[[Path], None] | None) -> Iterator[None]:
    """Hold an exclusive lock; the kernel lets go of it when this process dies, however it dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        while not _try_lock(file.fileno()):
            if on_wait:
                on_wait(path)
            time.sleep(0.5)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _seal(
    folder: Path, step: str, kind: Kind, record: dict[str, Any], output: dict[str, Any], about: dict[str, Any]
) -> None:
    files = list_files(folder)
    artifact = Artifact(
        step=step,
        kind=kind,
        fingerprint=fingerprint(record),
        record=record,
        digest=payload_digest(kind, files),
        files=tuple(files),
        output=output,
        provenance={**about, "created": datetime.now(UTC).isoformat(timespec="seconds")},
        path=folder,
    )
    write_json(folder / SEAL, artifact.model_dump(mode="json"))


def _move(partial: Path, place: Path) -> Artifact:
    """Rename a sealed folder to its final name; what was there before is set aside first, then removed."""
    old = place.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    partial.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    return load_artifact(place)
