import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bridge.errors import InputError
from bridge.folder_lock import locked


@contextmanager
def held_for_a_while(folder: Path) -> Iterator[list[str]]:
    """Hold the lock, let go of it soon after the block has begun; yield what happens in order."""
    events: list[str] = []
    taken = threading.Event()

    def hold() -> None:
        with locked(folder):
            taken.set()
            threading.Event().wait(0.3)
            events.append("let go")

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(60)
    yield events
    holder.join()


@pytest.mark.parametrize(("refusal", "patience"), [(None, 0.0), ("is held", 100.0)])
def test_a_lock_is_waited_for(refusal: str | None, patience: float, tmp_path: Path) -> None:
    with held_for_a_while(tmp_path) as events, locked(tmp_path, refusal, patience):
        events.append("taken")
    assert events == ["let go", "taken"]


@pytest.mark.parametrize("patience", [0.0, 0.2])
def test_a_lock_is_refused(patience: float, tmp_path: Path) -> None:
    before = descriptors()
    with locked(tmp_path):
        with (
            pytest.raises(InputError, match=rf"^{tmp_path} is held: wait$"),
            locked(tmp_path, "is held: wait", patience),
        ):
            pytest.fail("entered")
        assert descriptors() == before + 1
    assert descriptors() == before


def test_an_error_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path, "is held"):
        pass


@pytest.mark.parametrize("how", ["removed", "replaced"])
@pytest.mark.parametrize("refusal", [None, "is held"])
def test_the_lock_of_a_folder_that_has_gone_is_none(
    how: str, refusal: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes between its opening and the locking."""
    real, folder, before = fcntl.flock, tmp_path / "folder", descriptors()
    folder.mkdir()

    def flock(descriptor: int, operation: int) -> None:
        folder.rename(tmp_path / "final")
        if how == "replaced":
            folder.mkdir()
        real(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(FileNotFoundError), locked(folder, refusal):
        pytest.fail("entered")
    assert descriptors() == before


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
