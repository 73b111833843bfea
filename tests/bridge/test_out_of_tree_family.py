"""The example of docs/adding_a_family.md: built, installed in a folder of its own, and run."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "adding_a_family.md"
# a line that is nothing but a file's name, and the block below it
FILES = re.compile(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files that the document shows."""
    folder = tmp_path_factory.mktemp("bridgeworks-seed-oss")
    for name, content in FILES.findall(DOCUMENT.read_text()):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture(scope="module")
def environment(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install it as pip does, a wheel unpacked on the path, but for the network that pip would ask."""
    wheels, installed = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site-packages")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, wheels], cwd=package, check=True, capture_output=True)
    [wheel] = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    return {**os.environ, "PYTHONPATH": f"{installed}:{ROOT}", "OMP_NUM_THREADS": "1"}


def test_it_is_one_of_the_families(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "families"]

    def run(*options: str) -> str:
        program, environ = [*command, *options], environment
        return subprocess.run(
            program, cwd=tmp_path, env=environ, check=True, capture_output=True, text=True
        ).stdout

    families = {family["model_type"]: family for family in json.loads(run("--json"))}
    assert families["seed_oss"]["architecture"] == "SeedOssForCausalLM"
    assert "weights" in families["llama"]["checks"]
    # our suite has not tested it
    assert families["seed_oss"]["checks"] == {}
    assert re.search(r"^seed_oss .* by its own package$", run(), re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            "raise RuntimeError('too old')",
            "cannot be loaded: RuntimeError: too old; mend or remove the package",
        ),
        ("FAMILY = 'a family'", "is no bridge.family.Family, but str"),
        ("from bridge.families.llama import FAMILY", "offers a family 'llama', but there is one"),
    ],
)
def test_a_package_that_offers_none_is_named(module: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "others.py").write_text(f"{module}\n")
    (tmp_path / "others-1.dist-info").mkdir()
    (tmp_path / "others-1.dist-info" / "METADATA").write_text("Name: others\nVersion: 1\n")
    (tmp_path / "others-1.dist-info" / "entry_points.txt").write_text(
        "[bridgeworks.families]\nothers = others:FAMILY\n"
    )
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "flows.cli", "families"]
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: bridgeworks.families others:FAMILY of others {said}")
    assert result.stderr.count("\n") == 1


def test_its_own_test_passes(environment: dict[str, str], package: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    result = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "1 passed" in result.stdout


def test_the_family_of_ours_that_is_shown_is_the_one_that_is_there() -> None:
    [shown] = re.findall(r"^```python\n(FAMILY = .*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert (ROOT / "bridge" / "families" / "qwen2.py").read_text().endswith(shown)
