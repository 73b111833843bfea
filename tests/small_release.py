"""A whole release of a very small model, made once per session by the command line."""

import email
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.launch import launch

PROGRAM = str(Path(sys.executable).with_name("bridgeworks"))
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OVERRIDES = {
    "train.train_iters": 6,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 4,
    "checkpoint.save_interval": 3,
    "model.seq_length": 32,
    "optimizer.lr": 0.01,
    "optimizer.min_lr": 0.001,
    "scheduler.lr_warmup_iters": 1,
}
# must be found nowhere in the workspace afterwards
SECRETS = {"AWS_SECRET_ACCESS_KEY": "swordfish-of-s3", "HF_TOKEN": "hf_swordfish-of-the-hub"}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return subprocess.run(
        [PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **environment},
    )


def write_spec(folder: Path) -> Path:
    """Make a source checkpoint and a text in `folder`, and a spec that releases a successor of it."""
    shutil.copytree(Path(email.__file__).parent, folder / "text", ignore=shutil.ignore_patterns("*.pyc"))
    job = {
        "output": str(folder / "source"),
        "corpus": [str(folder / "text")],
        "vocab_size": 280,
        "config": TINY,
    }
    launch("training.make_checkpoint", {**job, "max_shard_size": "20KB"}, folder=folder / "job")
    spec: dict[str, Any] = {
        "name": "small",
        "workspace": ".",
        "source": {"uri": "source"},
        "dataset": {"inputs": ["text"], "validation_fraction": 0.1, "test_fraction": 0.1},
        "train": {"overrides": OVERRIDES},
        "check": {"num_prompts": 1, "prompt_length": 8, "loss_batches": 2},
        "publish": {"destination": "releases/{digest}", "max_shard_size": "20KB"},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder / "spec.yaml"


def seconds_of(spec: Path) -> float:
    """Return how long the release of `small_release` took on this machine."""
    return float(spec.with_name("seconds.txt").read_text())


@pytest.fixture(scope="session")
def small_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the spec of a release that has been made; its workspace is the spec's folder."""
    spec = write_spec(tmp_path_factory.mktemp("release"))
    started = time.monotonic()
    made = run("release", spec, PREFECT_HOME=str(spec.parent / "prefect"), **SECRETS)
    assert made.returncode == 0, made.stdout + made.stderr
    spec.with_name("seconds.txt").write_text(str(time.monotonic() - started))
    spec.with_name("output.txt").write_text(made.stdout)
    return spec
