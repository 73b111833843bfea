"""What only a GPU has: offloading, an optimizer of few bits, Transformer Engine recomputing, profilers."""

import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu.test_devices import run_job, small_model, training_job  # noqa: F401
from gpu.test_precision import curve

pytestmark = pytest.mark.gpu

OFFLOADED = {"model.cpu_offloading": True, "model.cpu_offloading_num_layers": 1}
ON_THE_HOST = {"optimizer.optimizer_cpu_offload": True, "optimizer.use_precision_aware_optimizer": True}
FEW_BITS = {
    "optimizer.use_precision_aware_optimizer": True,
    "optimizer.main_grads_dtype": "bfloat16",
    "optimizer.exp_avg_dtype": "bfloat16",
    "optimizer.exp_avg_sq_dtype": "bfloat16",
}
WAYS: dict[str, dict[str, Any]] = {
    "activations on the host": OFFLOADED,
    "optimizer on the host": ON_THE_HOST,
    "half of the optimizer on the host": {**ON_THE_HOST, "optimizer.optimizer_offload_fraction": 0.5},
    "moments of 16 bits": FEW_BITS,
    "moments of 8 bits": {**FEW_BITS, "optimizer.exp_avg_dtype": "uint8"},
    "selective recomputation": {
        "model.recompute_granularity": "selective",
        "model.recompute_modules": ["core_attn", "mlp"],
    },
    "full recomputation": {
        "model.recompute_granularity": "full",
        "model.recompute_method": "uniform",
        "model.recompute_num_layers": 1,
    },
}


def job_with(model: dict[str, Path], folder: Path, iterations: int, changes: dict[str, Any]) -> dict:
    job = training_job(model, folder, iterations)
    for name, value in {"optimizer.lr": 3e-4, **changes}.items():
        section, field = name.split(".")
        job["config"][section][field] = value
    return job


@pytest.fixture(scope="session")
def plain(small_model: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:  # noqa: F811
    folder = tmp_path_factory.mktemp("plain")
    run_job("training.pretrain", job_with(small_model, folder, 20, {}), folder / "job")
    return curve(folder)


@pytest.mark.parametrize("way", WAYS)
def test_saving_memory_changes_nothing(way, small_model, plain, tmp_path):  # noqa: F811
    """Ten iterations and ten more after a resume, against twenty of an ordinary run."""
    for part, iterations in (("a", 10), ("b", 20)):
        run_job("training.pretrain", job_with(small_model, tmp_path, iterations, WAYS[way]), tmp_path / part)
    losses = curve(tmp_path)
    difference = max(abs(losses[n] - plain[n]) for n in plain)
    print(way, difference)
    assert sorted(losses) == list(range(1, 21))
    assert difference < 0.02


def test_profilers_write_their_windows(small_model, tmp_path):  # noqa: F811
    window = {"profile_step_start": 3, "profile_step_end": 5, "output": str(tmp_path / "profile")}
    tools = {"use_pytorch_profiler": True, "record_memory_history": True}
    changes = {f"profiling.{name}": value for name, value in {**window, **tools}.items()}
    run_job("training.pretrain", job_with(small_model, tmp_path, 6, changes), tmp_path / "job")
    written = {file.name for file in (tmp_path / "profile").iterdir()}
    assert written == {"rank0.operations.txt", "rank0.trace.json.gz", "rank0.memory.pickle"}
    snapshot = pickle.loads((tmp_path / "profile" / "rank0.memory.pickle").read_bytes())  # our own file
    assert any(snapshot["device_traces"])
    assert "Self CUDA" in (tmp_path / "profile" / "rank0.operations.txt").read_text()


def nsys() -> str | None:
    inside = "/opt/nvidia/nsight-compute"
    found = (
        sorted(map(str, Path(inside).glob("*/host/target-linux-x64/nsys"))) if Path(inside).is_dir() else []
    )
    return shutil.which("nsys") or (found[-1] if found else None)


@pytest.mark.skipif(nsys() is None, reason="needs Nsight Systems")
def test_nsys_sees_the_window(small_model, tmp_path):  # noqa: F811
    profiling = {"profile_step_start": 3, "profile_step_end": 5, "use_nsys_profiler": True}
    changes = {f"profiling.{name}": value for name, value in profiling.items()}
    job = job_with(small_model, tmp_path, 6, changes)
    window = ("--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--trace=cuda,nvtx")
    tool = (str(nsys()), "profile", *window, "--output", str(tmp_path / "window"), sys.executable)
    run_job("training.pretrain", job, tmp_path / "job", python=tool)
    assert list(tmp_path.glob("window.*"))
    assert len(curve(tmp_path)) == 6
