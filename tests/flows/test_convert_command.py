"""`bridgeworks import` and `export` where they are stopped, go on, or find something in their way."""

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_hf_checkpoint
from s3_server import BUCKET, s3, s3_server

from bridge.staging import SUFFIX
from flows.convert import import_from

# Sizes that only large models reach, made small: several files, one finished after another.
STOPPED = """
import os, signal, sys
from contextlib import contextmanager
import bridge.chunk_plan, flows.convert
from flows.cli import main
bridge.chunk_plan.SMALL_CHECKPOINT = 0
number = signal.Signals[sys.argv.pop(1)] if sys.argv[1].startswith("SIG") else None

@contextmanager
def progress(description):
    def show(done, total):
        global number
        if number and done > total * 0.6:
            number, sent = None, number
            os.kill(os.getpid(), sent)
    yield show

flows.convert.progress = progress
main()
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STOPPED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_checkpoint(tmp_path_factory.mktemp("convert") / "hf", "llama")


@pytest.mark.parametrize(("signal", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_one_that_is_stopped_says_how_to_go_on(signal: str, code: int, hf: Path, tmp_path: Path) -> None:
    arguments = ("import", hf, tmp_path / "megatron", "--workers", 1)
    stopped = run(signal, *arguments)
    assert stopped.returncode == code
    assert stopped.stderr.splitlines() == [
        f"stopped: the same command goes on from {tmp_path / 'megatron'}{SUFFIX}; remove it if not wanted"
    ]
    if signal == "SIGINT":
        assert "were there from an interrupted conversion" in run(*arguments).stdout
    else:
        other = run(*arguments, "--dtype", "float32")
        assert "had finished was not used: other dtypes" in other.stdout


def test_an_import_from_an_address_leaves_its_result_alone(hf: Path, tmp_path: Path) -> None:
    """A folder of the user's is left alone, whatever its name."""
    (tmp_path / "megatron.fetched").mkdir()
    (tmp_path / "megatron.fetched" / "notes").write_text("mine")
    with s3_server():
        s3().put(str(hf), f"{BUCKET}/llama", recursive=True)
        import_from(f"s3://{BUCKET}/llama", tmp_path / "megatron")
    assert {path.name for path in tmp_path.iterdir()} == {"megatron", "megatron.fetched"}
    assert (tmp_path / "megatron.fetched" / "notes").read_text() == "mine"
