"""Runs that really lose ranks in the middle of training, and the launcher that starts them again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from process_groups import TESTS

from bridge.ledger import DIFFERENT, compare_ledgers, ledger
from tasks.launch import launch
from tasks.restart import ATTEMPTS, run_with_restarts
from training.metrics import read_metrics

ITERATIONS, MICRO_BATCHES = 9, 4
SETTINGS = {
    "model.tensor_model_parallel_size": 2,
    "model.hidden_dropout": 0.1,
    "mixed_precision.bf16": True,
    "train.train_iters": ITERATIONS,
    "train.eval_interval": None,
    "checkpoint.save_interval": 3,
    "resilience.hang_timeout": 4.0,
}
# in iteration 5 of a new run, and in iteration 8 of one that goes on after the third
DISTURBANCES = [("SIGSTOP", 4 * MICRO_BATCHES + 1), ("SIGKILL", 4 * MICRO_BATCHES + 1)]
ENVIRONMENT = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(tiny_config, imported, tmp_path):
    def start(name: str, disturbances: list[tuple[str, int]]) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        job = {
            "config": tiny_config(**SETTINGS).to_dict(),
            "load": str(imported),
            "output": str(folder / "checkpoints"),
            "metrics": str(folder / "metrics.jsonl"),
            "notes": str(folder),
            "disturbances": disturbances,
        }
        return run_with_restarts(
            lambda attempt: launch(
                "training_jobs.disturbed",
                job,
                folder=folder / attempt,
                num_processes=2,
                environment=ENVIRONMENT,
                timeout=120,
            ),
            checkpoints=folder / "checkpoints",
            folder=folder,
            max_restarts=1,
            log=print,
        )

    return start


def curve(folder: Path, key: str) -> dict[int, float]:
    return {line["iteration"]: line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line}


@pytest.mark.slow
def test_a_run_that_hangs_and_then_loses_a_rank_ends_like_one_that_was_left_alone(run, tmp_path):
    report = run("disturbed", DISTURBANCES)
    run("undisturbed", [])
    folders = [tmp_path / "disturbed", tmp_path / "undisturbed"]

    hang, loss, end = json.loads((folders[0] / ATTEMPTS).read_text())
    assert report["attempts"] == [hang, loss, end]
    assert (hang["from_iteration"], hang["to_iteration"], hang["outcome"]) == (0, 3, "crashed")
    assert (loss["from_iteration"], loss["to_iteration"], loss["outcome"]) == (3, 6, "crashed")
    assert (end["from_iteration"], end["to_iteration"], end["outcome"]) == (6, ITERATIONS, "done")
    # the other one waits in a sum of all tensor-parallel ranks; its own stack is where it was stopped
    assert "HangError: rank 1 (process " in hang["reason"]
    assert "has given no sign of life for" in hang["reason"]
    assert "disturbed.py" in hang["details"].splitlines()[1]
    assert "in forward_step" in hang["details"].splitlines()[1]
    assert re.search(r"Root Cause.*rank      : 1 .*\(SIGKILL\)", loss["details"], re.DOTALL)

    for key in ("loss", "grad_norm", "learning_rate"):
        found, expected = (curve(folder, key) for folder in folders)
        assert list(expected) == list(range(1, ITERATIONS + 1))
        assert found == expected, key
    last = [folder / "checkpoints" / f"iter_{ITERATIONS:07d}" for folder in folders]
    assert not compare_ledgers(*map(ledger, last)).names(DIFFERENT)
