"""The gates: that they pass what is right and, above all, that they fail what is not."""

import json
import shutil
from pathlib import Path

import pytest

from bridge.errors import GateError
from bridge.importer import import_checkpoint
from tasks.gates import check_coverage, check_digests, conclude, gate_rows, verdict
from tasks.step import RunRecord, StepContext
from tests.checkpoints import make_hf_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    source = make_hf_checkpoint(folder / "hf", "llama")
    import_checkpoint(source, folder / "megatron")
    return source, folder / "megatron"


@pytest.fixture
def context(tmp_path) -> StepContext:
    return StepContext(RunRecord("tiny", tmp_path), tmp_path / "run")


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_coverage_and_digests_of_an_import_pass(checkpoints, tmp_path) -> None:
    assert check_coverage(checkpoints[0])["passed"]
    result = check_digests(*checkpoints, tmp_path / "ledger.csv")
    assert result["passed"]
    assert result["metrics"]["different"] == 0
    assert len((tmp_path / "ledger.csv").read_text().splitlines()) == result["metrics"]["equal"] + 1


def test_one_flipped_bit_fails_the_digests(checkpoints, tmp_path) -> None:
    source, megatron = checkpoints
    damaged = shutil.copytree(source, tmp_path / "damaged")
    flip_last_byte(sorted(damaged.glob("*.safetensors"))[0])
    result = check_digests(damaged, megatron, tmp_path / "ledger.csv")
    assert not result["passed"]
    assert result["metrics"]["different"] == 1


def test_a_missing_shard_fails_the_coverage(checkpoints, tmp_path) -> None:
    damaged = shutil.copytree(checkpoints[0], tmp_path / "damaged")
    sorted(damaged.glob("*.safetensors"))[0].unlink()
    result = check_coverage(damaged)
    assert not result["passed"]
    assert result["metrics"]["unaccounted"] == 1


def test_failing_gate_raises_and_keeps_its_report(context, tmp_path) -> None:
    good = verdict("coverage", {"unaccounted": 0}, {"unaccounted": 0}, [])
    bad = verdict("held_out_loss", {"loss_after": 3.0}, {"loss_after": 2.0}, ["held-out loss is 3"])
    sealed = tmp_path / "sealed"
    with pytest.raises(GateError, match=r"verify failed: held_out_loss: held-out loss is 3 \(report: .*\)"):
        conclude([good, bad], sealed, context, "verify")
    assert not sealed.exists()
    report = json.loads((context.folder / "report.json").read_text())
    assert (report["passed"], report["gates"]["coverage"]["passed"]) == (False, True)


def test_passing_gates_are_sealed(context, tmp_path) -> None:
    good = verdict("coverage", {"unaccounted": 0}, {"unaccounted": 0}, [])
    assert conclude([good], tmp_path / "sealed", context, "verify")["passed"]
    assert json.loads((tmp_path / "sealed" / "report.json").read_text())["gates"] == {"coverage": good}


@pytest.mark.parametrize(
    ("measure", "value", "bound", "word", "allowed"),
    [
        ("max_abs", 2.0, 1.0, "FAILED", "at most 1"),
        ("max_abs", 1.0, 1.0, "passed", "at most 1"),
        ("max_abs", float("nan"), 1.0, "FAILED", "at most 1"),
    ],
)
def test_rows_say_value_bound_and_verdict(measure, value, bound, word, allowed) -> None:
    [row] = gate_rows([verdict("logits", {measure: value}, {measure: bound}, [])])
    assert (row["verdict"], row["allowed"]) == (word, allowed)
