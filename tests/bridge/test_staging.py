import errno
import os
from pathlib import Path

import pytest

from bridge.errors import InputError
from bridge.staging import staged_folder


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
