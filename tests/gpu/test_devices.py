"""One checkpoint for the CPU with local layers and the GPU with Transformer Engine layers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bridge.importer import import_checkpoint
from checkpoints import make_hf_checkpoint

from bridge.families import families

pytestmark = pytest.mark.gpu

# Transformer Engine's fused attention wants heads of 64 or 128.
GPU_SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def run_job(
    module: str, config: dict[str, Any], folder: Path, ranks: int = 1, gpu: bool = True
) -> dict[str, Any]:
    """Run a job under torchrun, on GPUs or with the GPUs hidden, and return its report."""
    folder.mkdir(parents=True)
    config = {**config, "report": str(folder / "report.json")}
    (folder / "job.json").write_text(json.dumps(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run(
        [sys.executable, *launcher, "-m", "bridge.job", module, str(folder / "job.json")],
        check=True,
        env=environment,
    )
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return the Hugging Face folder of a family and its Megatron import."""
    root = tmp_path_factory.mktemp("gpu")

    def get(family: str) -> tuple[Path, Path]:
        hf, megatron = root / family / "hf", root / family / "megatron"
        if not megatron.exists():
            make_hf_checkpoint(hf, family, **GPU_SIZES)
            import_checkpoint(hf, megatron)
        return hf, megatron

    return get


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", families())
def test_import_agrees_under_transformer_engine(
    family: str, dtype: str, checkpoint: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, megatron = checkpoint(family)
    config = {"a": str(hf), "b": str(megatron), "dtype": dtype, "table": str(tmp_path / "table.jsonl")}
    report = run_job("bridge.compare_logits", config, tmp_path / "job")
    print(family, dtype, report["gate"])
    assert report["gate"]["passed"], report["gate"]["failures"]
