import os
from pathlib import Path

from bridge.staging import SUFFIX
from training.checkpoint_folders import (
    REMOVED,
    complete_checkpoints,
    flush,
    remove_leftovers,
    remove_old,
    write_latest,
)


def folders(root, *names):
    for name in names:
        (root / name).mkdir()
        (root / name / "file").touch()


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_only_whole_folders_count(tmp_path):
    folders(
        tmp_path, "iter_0000020", "iter_10000000", f"iter_0000030{SUFFIX}", f"iter_0000010{REMOVED}", "other"
    )
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["iter_0000020", "iter_10000000"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["iter_0000020", "iter_10000000", "other"]
    assert complete_checkpoints(tmp_path / "none") == []


def test_retention_keeps_the_newest(tmp_path):
    folders(tmp_path, "iter_0000005", "iter_0000010", "iter_0000015")
    remove_old(tmp_path, None).join()
    assert len(complete_checkpoints(tmp_path)) == 3
    remove_old(tmp_path, 1).join()
    assert names(tmp_path) == ["iter_0000015"]


def test_latest_is_replaced_whole(tmp_path):
    write_latest(tmp_path, 5)
    write_latest(tmp_path, 10)
    assert names(tmp_path) == ["latest_checkpointed_iteration.txt"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "10\n"


def flushed(monkeypatch) -> list[tuple[str, list[str]]]:
    """What is brought to the disk from now on, with the names that are beside it then."""
    found, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        found.append((path.name, names(path.parent)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return found


def test_files_and_their_names_are_brought_to_the_disk(tmp_path, monkeypatch):
    folders(tmp_path, "iter_0000005", "iter_0000005/hf")
    (tmp_path / "iter_0000005" / "__0_0.distcp").touch()
    found = flushed(monkeypatch)
    flush(tmp_path / "iter_0000005", but={"__0_0.distcp": 17})
    assert sorted(name for name, _ in found) == ["file", "file", "hf", "iter_0000005"]
    assert found[-1][0] == "iter_0000005"


def test_the_latest_is_on_the_disk_before_older_ones_go(tmp_path, monkeypatch):
    found = flushed(monkeypatch)
    write_latest(tmp_path, 10)
    latest = "latest_checkpointed_iteration.txt"
    assert found[0] == (f"{latest}{SUFFIX}", [f"{latest}{SUFFIX}"])
    assert found[1][0] == tmp_path.name
    assert (tmp_path / latest).is_file()
