import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.errors import InputError
from bridge.staging import SUFFIX, resumable_folder, staged_folder


def test_appears_when_complete(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "a" / "b", 10) as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "b", 10) as folder:
        (folder / "file").write_text("x")
        with (
            pytest.raises(InputError, match="written by another process"),
            staged_folder(tmp_path / "b", 10),
        ):
            pass
    assert (tmp_path / "b" / "file").read_text() == "x"


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="no space was left while writing"),
        staged_folder(tmp_path / "b", 10),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_users_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "notes").write_text("mine")
    with staged_folder(tmp_path / "b", 10):
        pass
    with resumable_folder(tmp_path / "c", 10, {}):
        pass
    assert (tmp_path / "b.partial" / "notes").read_text() == "mine"


def link(path: Path) -> None:
    path.symlink_to("nowhere")


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("a file")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (Path.mkdir, "exists already"),
        (link, "exists already"),
        (below_a_file, "cannot be made: .*directory|exists"),
    ],
)
def test_refuses_a_destination(prepare: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    prepare(tmp_path / "a" / "b")
    for folder in (staged_folder(tmp_path / "a" / "b", 10), resumable_folder(tmp_path / "a" / "b", 10, {})):
        with pytest.raises(InputError, match=message), folder:
            pass
    assert not list(tmp_path.rglob(f"*{SUFFIX}"))


def test_a_destination_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"is complete, but cannot become .*/b \(File exists"),
        resumable_folder(tmp_path / "b", 10, {}) as journal,
    ):
        (tmp_path / "b").mkdir()
    assert not list(journal.folder.iterdir())


@pytest.mark.parametrize("how", ["rename", "remove"])
def test_a_folder_that_another_process_ends_with_is_not_taken(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening of its folder and the locking."""
    real, partial = fcntl.flock, tmp_path / f"b{SUFFIX}"

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr("fcntl.flock", real)
        (partial / "file").write_text("another's")
        partial.rename(tmp_path / "b") if how == "rename" else shutil.rmtree(partial)
        real(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", flock)
    if how == "rename":
        with pytest.raises(InputError, match="exists already"), staged_folder(tmp_path / "b", 10):
            pass
        assert (tmp_path / "b" / "file").read_text() == "another's"
    else:
        with staged_folder(tmp_path / "b", 10) as folder:
            (folder / "file").write_text("x")
        assert (tmp_path / "b" / "file").read_text() == "x"
    assert not partial.exists()


def test_says_how_much_space_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=7_600_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(InputError, match=r"has 7\.6 MB free, 2\.0 GB are needed"),
        staged_folder(tmp_path / "b", 2_000_000_000),
    ):
        pass
