"""Files and folders that the user may not read or write: one line, as a shell of an ordinary user sees it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import copy_checkpoint, make_hf_checkpoint

from bridge.importer import import_checkpoint

PROGRAM = str(Path(sys.executable).with_name("bridgeworks"))
# For root no file is closed, unless it lacks these.
CAPABILITIES = "-dac_override,-dac_read_search"

pytestmark = pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("setpriv"), reason="root without setpriv, for whom all is open"
)


def run_as_a_user(*command: object) -> subprocess.CompletedProcess[str]:
    prefix = ["setpriv", "--bounding-set", CAPABILITIES] if os.geteuid() == 0 else []
    return subprocess.run([*prefix, *map(str, command)], capture_output=True, text=True, timeout=240)


def check_refused(result: subprocess.CompletedProcess[str], file: Path) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: {file} cannot be used: Permission denied: change"), result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_checkpoint(tmp_path_factory.mktemp("refused") / "hf", "llama")


@pytest.fixture(params=["config.json", "model-00002-of-00004.safetensors", "generation_config.json", "."])
def closed(request: pytest.FixtureRequest, hf: Path, tmp_path: Path) -> Path:
    """A file of a Hugging Face folder that may not be read."""
    file = copy_checkpoint(hf, tmp_path / "hf") / request.param
    file.chmod(0)
    return file


def test_import_and_compare_of_what_may_not_be_read(closed: Path, tmp_path: Path) -> None:
    named = closed if closed.suffix else closed / "config.json"
    check_refused(run_as_a_user(PROGRAM, "import", tmp_path / "hf", tmp_path / "out"), named)
    assert not list(tmp_path.glob("out*"))
    if closed.suffix == ".safetensors":
        check_refused(run_as_a_user(PROGRAM, "compare", tmp_path / "hf", tmp_path / "hf"), named)


@pytest.mark.parametrize("name", ["model.json", "__0_0.distcp", "hf"])
def test_export_of_what_may_not_be_read(name: str, hf: Path, tmp_path: Path) -> None:
    file = import_checkpoint(hf, tmp_path / "megatron").path / name
    file.chmod(0)
    check_refused(run_as_a_user(PROGRAM, "export", tmp_path / "megatron", tmp_path / "out"), file)
    assert not list(tmp_path.glob("out*"))


def test_the_report_of_a_comparison_where_nothing_may_be_written(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    report = tmp_path / "closed" / "report.json"
    result = run_as_a_user(PROGRAM, "compare", hf, hf, "--only", "config", "--report", report)
    assert result.returncode == 2
    assert "Permission denied" in result.stderr
    assert result.stderr.count("\n") == 1


def test_for_python_it_is_an_input_error(hf: Path, tmp_path: Path) -> None:
    source = copy_checkpoint(hf, tmp_path / "hf")
    (source / "config.json").chmod(0)
    call = f"from bridge.importer import import_checkpoint; import_checkpoint({str(source)!r}, 'out')"
    result = run_as_a_user(sys.executable, "-c", call)
    assert result.stderr.splitlines()[-1].startswith("bridge.errors.InputError: ")
