from bridge.staging import SUFFIX
from training.checkpoint_folders import (
    REMOVED,
    complete_checkpoints,
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
