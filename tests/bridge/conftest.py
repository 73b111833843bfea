"""Checkpoints that the tests of bridge/ share; a test that changes one copies it first."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_hf_checkpoint

from bridge.importer import import_checkpoint
from bridge.megatron_checkpoint import LATEST, copy_model

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Return the folder of `make_hf_checkpoint(folder, family, **settings)`, made once per setting."""
    made: dict[str, Path] = {}

    def get(family: str, **settings: Any) -> Path:
        key = f"{family} {sorted(settings.items())}"
        if key not in made:
            made[key] = make_hf_checkpoint(tmp_path_factory.mktemp(family) / "hf", family, **settings)
        return made[key]

    return get


@pytest.fixture(scope="session")
def megatron_checkpoint(hf_checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Return the folder of the imported `hf_checkpoint(family, **settings)`, made once per setting."""
    made: dict[Path, Path] = {}

    def get(family: str, **settings: Any) -> Path:
        source = hf_checkpoint(family, **settings)
        if source not in made:
            made[source] = import_checkpoint(source, tmp_path_factory.mktemp(family) / "megatron").path
        return made[source]

    return get


@pytest.fixture(scope="session")
def training_run(megatron_checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run's folder with one checkpoint of `qwen2`, saved by Megatron Core at TP=2."""
    source, run = megatron_checkpoint("qwen2"), tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("save_sharded.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    saved = run / "iter_0000005"
    subprocess.run([*command, script, source, saved], check=True, env=environment, timeout=240)
    copy_model(source, saved, num_padding_rows=96)  # as save_sharded.py pads
    (run / LATEST).write_text("5")
    return run
