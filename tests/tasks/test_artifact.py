"""Artifacts: sealing, finding, resuming, locking, and that nothing unfinished passes for a result."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from tasks.artifact import Artifact, Kind, Store, load_artifact
from tasks.errors import ArtifactError

RECORD = {"config": {"lr": 0.1}, "inputs": {"source": "ab"}}


def fill(folder: Path, text: str = "weights") -> dict:
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "checkpoint" / "model.bin").write_text(text)
    (folder / "note.txt").write_text(str(time.time_ns()))
    return {"tensors": 1}


def build(store: Store, record: dict = RECORD, fill=fill, **options) -> Artifact:
    return store.build("import", Kind.MEGATRON_CHECKPOINT, record, fill, name="tiny", **options)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def test_built_once_then_found(store) -> None:
    first = build(store)
    again = build(store, fill=lambda folder: pytest.fail("built twice"))
    assert again == first == store.find("import", RECORD) == load_artifact(first.path)
    assert first.payload.joinpath("model.bin").read_text() == "weights"
    assert (first.output, first.provenance["name"]) == ({"tensors": 1}, "tiny")
    assert [entry.path for entry in first.files] == ["checkpoint/model.bin", "note.txt"]


def test_digest_is_of_the_payload_alone(store) -> None:
    one, two, other = (
        build(store, {"n": 1}),
        build(store, {"n": 2}),
        build(store, {"n": 3}, lambda f: fill(f, "x")),
    )
    assert one.digest == two.digest != other.digest


def test_failed_build_leaves_no_result(store) -> None:
    def fail(folder: Path) -> dict:
        fill(folder)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        build(store, fill=fail)
    assert store.find("import", RECORD) is None
    assert store.newest("import", "tiny") is None
    assert build(store).output == {"tensors": 1}


def test_payload_is_required(store) -> None:
    with pytest.raises(ArtifactError, match="payload called 'checkpoint'"):
        build(store, fill=lambda folder: {})
    assert store.find("import", RECORD) is None


@pytest.mark.parametrize("resumable", [True, False])
def test_only_resumable_steps_see_what_was_left(store, resumable) -> None:
    def interrupted(folder: Path) -> dict:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(store, fill=interrupted, resumable=resumable)
    seen = []
    build(store, fill=lambda folder: seen.extend(folder.iterdir()) or fill(folder), resumable=resumable)
    assert [path.name for path in seen] == (["half"] if resumable else [])


def test_missing_and_truncated_files_are_named_and_rebuilt(store) -> None:
    artifact = build(store)
    (artifact.payload / "model.bin").write_text("w")
    assert artifact.problem() == "file checkpoint/model.bin has 1 bytes instead of 7"
    (artifact.payload / "model.bin").unlink()
    assert artifact.problem() == "file checkpoint/model.bin is missing"
    assert build(store).problem() is None


def test_verify_reads_the_content(store) -> None:
    artifact = build(store)
    artifact.verify()
    (artifact.payload / "model.bin").write_text("weighty"[:7])
    with pytest.raises(ArtifactError, match=r"checkpoint/model.bin has sha256"):
        artifact.verify()


def test_rebuild_replaces(store) -> None:
    build(store)
    assert build(store, fill=lambda folder: fill(folder, "new"), rebuild=True).payload.joinpath(
        "model.bin"
    ).read_text() == ("new")


def test_newest_is_of_the_same_release(store) -> None:
    old = build(store, {"n": 1})
    new = build(store, {"n": 2})
    os.utime(old.path / "artifact.json", (1, 1))
    store.build("import", Kind.MEGATRON_CHECKPOINT, {"n": 3}, fill, name="other")
    assert store.newest("import", "tiny") == new
    assert store.newest("import", "nobody") is None


def test_broken_seal_says_what_to_do(store) -> None:
    artifact = build(store)
    (artifact.path / "artifact.json").write_text("{")
    with pytest.raises(ArtifactError, match="remove the folder"):
        load_artifact(artifact.path)


def _slow_build(root: Path) -> None:
    def slow(folder: Path) -> dict:
        (root / f"built-by-{os.getpid()}").touch()
        time.sleep(1)
        return fill(folder)

    build(Store(root), fill=slow)


def test_two_processes_build_once(tmp_path) -> None:
    tmp_path.joinpath("store").mkdir()
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=_slow_build, args=(tmp_path / "store",)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(tmp_path.glob("store/built-by-*"))) == 1
