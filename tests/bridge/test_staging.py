import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.errors import InputError
from bridge.staging import AGAIN, JOURNAL, SUFFIX, Journal, resumable_folder, staged_folder


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


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space was left while writing"),
        (errno.EDQUOT, "no space was left while writing"),
        (errno.EFBIG, "is larger than its file system or `ulimit -f` allows"),
    ],
)
def test_a_full_disk_is_said_in_one_line(number: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message), staged_folder(tmp_path / "b", 10):
        raise OSError(number, os.strerror(number))
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


@pytest.mark.parametrize("nameless", [".", "/", ""])
def test_refuses_a_folder_without_a_name(nameless: str) -> None:
    for folder in (staged_folder(Path(nameless), 10), resumable_folder(Path(nameless), 10, {})):
        with pytest.raises(InputError, match="exists already"), folder:
            pass


def interrupted(destination: Path, *names: str) -> Path:
    """Begin a folder of files of one byte, and stop when those named are finished; return what is left."""
    with pytest.raises(KeyboardInterrupt):
        write(destination, names, KeyboardInterrupt())
    return destination.with_name(f"{destination.name}{SUFFIX}")


def write(destination: Path, names: tuple[str, ...], error: BaseException) -> None:
    with resumable_folder(destination, 10, {"made of": "this"}) as journal:
        for name in names:
            if name not in journal.finished:
                (journal.folder / name).write_text("x")
                journal.finish(name)
        (journal.folder / "unfinished").write_text("x")
        raise error


def test_a_journal_is_made_by_the_first_finished_file(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "b")
    assert [path.name for path in partial.iterdir()] == ["unfinished"]
    interrupted(tmp_path / "b", "one")
    interrupted(tmp_path / "b", "one", "two")
    with resumable_folder(tmp_path / "b", 10, {"made of": "this"}) as journal:
        assert sorted(journal.finished) == ["one", "two"]
        assert sorted(path.name for path in partial.iterdir()) == [JOURNAL, "one", "two"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["one", "two"]
    with resumable_folder(tmp_path / "c", 10, {}) as journal:
        (journal.folder / "only").write_text("x")  # by a process that needs no journal
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["only"]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda data: data[:-3], ["one"]),
        (lambda data: data[:30], []),
        (lambda data: bytes(len(data)), []),
        (lambda data: bytes(20) + data[20:], []),
        (lambda data: data + bytes(20), ["one", "two"]),
    ],
    ids=["last line cut off", "first line cut off", "zeros", "begins with zeros", "ends with zeros"],
)
def test_a_damaged_journal_is_trusted_up_to_the_damage(
    damage: Callable[[bytes], bytes], kept: list[str], tmp_path: Path
) -> None:
    partial = interrupted(tmp_path / "b", "one", "two")
    (partial / JOURNAL).write_bytes(damage((partial / JOURNAL).read_bytes()))
    journal = Journal(partial, {"made of": "this"})
    assert sorted(journal.finished) == kept
    (partial / "three").write_text("x")
    journal.finish("three")  # behind nothing that is damaged
    assert sorted(Journal(partial, {"made of": "this"}).finished) == sorted([*kept, "three"])


def test_a_process_that_is_killed_as_it_goes_on_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupted(tmp_path / "b", "one", "two")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Journal(partial, {"made of": "this"})
    assert (partial / AGAIN).exists()
    assert sorted(Journal(partial, {"made of": "this"}).finished) == ["one", "two"]


@pytest.mark.parametrize("free", [0, 1 << 40], ids=["no space", "an error later"])
def test_an_error_leaves_what_an_earlier_writing_had_finished(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupted(tmp_path / "b", "one", "two")
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(InputError):
            write(tmp_path / "b", ("one", "two", "three"), InputError("a setting is wrong"))
    assert sorted(path.name for path in partial.iterdir()) == [JOURNAL, "one", "two"]
    with resumable_folder(tmp_path / "b", 10, {"made of": "that"}) as journal:
        assert journal.started_over == ("made of",)
        assert not journal.finished
    assert not list((tmp_path / "b").iterdir())


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
