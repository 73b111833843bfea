"""`bridgeworks compare` as a shell sees it: what is refused at once, and what a script reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_hf_checkpoint

from bridge.differences import write_table
from bridge.gates import LogitsMetrics, judge_logits
from flows.compare import keep
from flows.console import print_json
from tasks.tables import read_rows

PROGRAM = str(Path(sys.executable).with_name("bridgeworks"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_checkpoint(tmp_path_factory.mktemp("compare") / "hf", "llama")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.json", b"[[1, 2, 99999]]", "token 99999 of a prompt is outside the vocabulary of 160"),
        ("prompts.json", b"[[]]", "there are no prompts to compare"),
        ("prompts.json", b"[[1,", "is not valid JSON"),
        ("prompts.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("prompts.txt", b"the cat sat\n", "neither end has a tokenizer"),
    ],
)
def test_prompts_are_refused_before_anything_is_measured(
    name: str, content: bytes, message: str, hf: Path, tmp_path: Path
) -> None:
    """No job can start here."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'BRIDGEWORKS_JOB' in os.environ: os._exit(3)\n")
    (tmp_path / name).write_bytes(content)
    result = subprocess.run(
        [PROGRAM, "compare", str(hf), str(hf), "--only", "logits", "--prompts", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def test_numbers_that_are_none_are_null_for_a_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = float("nan")
    gate = {"gate": "logits", **judge_logits(LogitsMetrics(nan, nan, nan, 1.0, 1.0, nan, nan), "float32")}
    result = {"passed": False, "gates": [gate]}
    keep(result, tmp_path, [], tmp_path / "report.json", None)
    print_json(result)
    for text in (capsys.readouterr().out, (tmp_path / "report.json").read_text()):
        found = json.loads(text, parse_constant=no_constant)["gates"][0]
        assert (found["metrics"]["kl"], found["metrics"]["top1_agreement"]) == (None, 1.0)
    write_table([{"layer": 1, "relative": nan}], str(tmp_path / "layers.jsonl"))
    assert read_rows(tmp_path / "layers.jsonl") == [{"layer": 1, "relative": None}]
