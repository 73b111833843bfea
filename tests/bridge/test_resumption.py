"""Conversions that are killed, stopped or refused, and what the next one finds."""

import filecmp
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import copy_checkpoint

from bridge.conversion import Conversion
from bridge.errors import ConfigError, InputError
from bridge.exporter import export_checkpoint
from bridge.importer import import_checkpoint
from bridge.staging import SUFFIX

Checkpoints = Callable[..., Path]

# Sizes that only large models reach, made small: several files, one finished after another.
KILLED = """
import os, signal, sys
import bridge.chunk_plan
from bridge.{module} import {function} as convert
bridge.chunk_plan.SMALL_CHECKPOINT = 0
def kill(done, total):
    if done > total * 0.6:
        os.kill(os.getpid(), signal.SIGKILL)
convert({source!r}, {destination!r}, workers=1, progress=kill{settings})
"""


def killed(convert: Callable[..., Conversion], source: Path, destination: Path, settings: str = "") -> Path:
    """Kill a conversion by SIGKILL when six tenths are done; return the folder that it leaves."""
    module = convert.__module__.rpartition(".")[2]
    code = KILLED.format(
        module=module,
        function=convert.__name__,
        source=str(source),
        destination=str(destination),
        settings=settings,
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not destination.exists()
    return destination.with_name(f"{destination.name}{SUFFIX}")


def assert_same_files(a: Path, b: Path) -> None:
    names = sorted(str(path.relative_to(a)) for path in a.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(b)) for path in b.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.chunk_plan.SMALL_CHECKPOINT", 0)


@pytest.mark.usefixtures("many_files")
def test_a_killed_import_goes_on(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = hf_checkpoint("llama")
    partial = killed(import_checkpoint, source, tmp_path / "megatron")
    files = {path: path.stat().st_mtime_ns for path in partial.glob("*.distcp")}
    calls: list[tuple[int, int]] = []
    second = import_checkpoint(
        source, tmp_path / "megatron", workers=1, progress=lambda *call: calls.append(call)
    )
    assert calls[0][0] == second.resumed > 0.4 * second.bytes
    assert calls[-1] == (second.bytes, second.bytes)
    kept = [path for path, time in files.items() if (second.path / path.name).stat().st_mtime_ns == time]
    assert len(kept) >= 3
    whole = import_checkpoint(source, tmp_path / "whole", workers=2)
    assert whole.resumed == 0
    assert_same_files(second.path, whole.path)


def test_a_killed_export_goes_on(megatron_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = megatron_checkpoint("llama")
    killed(export_checkpoint, source, tmp_path / "hf", ', max_shard_size="60KB"')
    second = export_checkpoint(source, tmp_path / "hf", max_shard_size="60KB")
    assert second.resumed > 0.4 * second.bytes
    whole = export_checkpoint(source, tmp_path / "whole", max_shard_size="60KB")
    assert_same_files(second.path, whole.path)


def test_a_setting_that_is_wrong_loses_no_finished_file(
    megatron_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = megatron_checkpoint("llama")
    killed(export_checkpoint, source, tmp_path / "hf", ', max_shard_size="60KB"')
    with pytest.raises(ConfigError, match="max_memory is 1 MiB"):
        export_checkpoint(source, tmp_path / "hf", max_shard_size="60KB", max_memory="1MiB")
    assert export_checkpoint(source, tmp_path / "hf", max_shard_size="60KB").resumed


WHAT_DIFFERS: dict[str, tuple[str, ...]] = {
    "source": ("files",),
    "settings": ("dtypes",),
    "reboot": ("boot",),
    "damage": (),  # the file does not count as finished
}


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("change", WHAT_DIFFERS)
def test_starts_over_after_a_change(
    change: str, hf_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_checkpoint(hf_checkpoint("llama"), tmp_path / "source")
    partial = killed(import_checkpoint, source, tmp_path / "megatron")
    dtype = "float32" if change == "settings" else None
    if change == "source":
        file = min(source.glob("*.safetensors"))
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    elif change == "reboot":
        (tmp_path / "boot_id").write_text("another")
        monkeypatch.setattr("bridge.staging.BOOT_ID", tmp_path / "boot_id")
    elif change == "damage":
        for path in partial.glob("*.distcp"):
            path.write_bytes(path.read_bytes()[:-1])
    second = import_checkpoint(source, tmp_path / "megatron", dtype=dtype)
    assert second.resumed == 0
    assert second.started_over == WHAT_DIFFERS[change]
    assert_same_files(second.path, import_checkpoint(source, tmp_path / "whole", dtype=dtype).path)


@pytest.mark.usefixtures("many_files")
def test_what_is_there_needs_no_space(
    hf_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hf_checkpoint("llama")
    killed(import_checkpoint, source, tmp_path / "megatron")
    monkeypatch.setattr("bridge.staging.SPARE_BYTES", 0)
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="KB free"):
        import_checkpoint(source, tmp_path / "other")
    assert import_checkpoint(source, tmp_path / "megatron").resumed


def test_one_that_is_stopped_can_go_on_and_one_that_fails_leaves_nothing(
    hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    for error, left in ((KeyboardInterrupt, [f"megatron{SUFFIX}"]), (RuntimeError, [])):

        def fail(done: int, total: int, error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            import_checkpoint(hf_checkpoint("llama"), tmp_path / "megatron", progress=fail)
        assert [path.name for path in tmp_path.iterdir()] == left
