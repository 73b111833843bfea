"""What the launcher knows of GPUs, from a fake nvidia-smi on PATH, and what it refuses by it."""

import importlib.metadata
from pathlib import Path

import pytest

from bridge.errors import ConfigError
from tasks import gpus
from tasks.gpus import NONE, Gpus, check_gpus, gpus_of_jobs
from training.config import ProfilingConfig
from training.precision import mixed_precision

FP8 = mixed_precision("bf16_with_fp8_blockwise_mixed")
SLURM = ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURMD_NODENAME")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of its own: no driver, no Slurm, nothing hidden, a torch that could use GPUs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "DRIVERS", (tmp_path / "driver",))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+cu130")
    for name in ("CUDA_VISIBLE_DEVICES", *SLURM):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake(tmp_path: Path):
    """A function that puts a fake nvidia-smi on PATH, for GPUs of these compute capabilities."""

    def put(*capabilities: str, exit_code: int = 0) -> None:
        lines = "".join(
            f"echo '{capability}, GPU-{number}a5c'\n" for number, capability in enumerate(capabilities)
        )
        asked = 'test "$*" = "--query-gpu=compute_cap,uuid --format=csv,noheader" || exit 2\n'
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{asked}{lines}exit {exit_code}\n")
        program.chmod(0o755)

    return put


def test_without_nvidia_smi_there_is_no_gpu() -> None:
    assert gpus_of_jobs() == NONE
    check_gpus(4, "sizes")
    with pytest.raises(ConfigError, match="FP8, which needs a GPU, and there is none"):
        check_gpus(1, "sizes", FP8)


def test_a_driver_without_its_tools_leaves_it_to_the_job(tmp_path: Path) -> None:
    (tmp_path / "driver").mkdir()
    assert gpus_of_jobs() is None
    check_gpus(4, "sizes", FP8)


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 3),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("2,0", 2),
        ("1, 0", 2),
        ("1,7,0", 1),
        ("7", 0),
        ("0,-1,1", 1),
        ("GPU-2", 1),
        ("GPU-2a5c,GPU-0a5c", 2),
        ("GPU-9", 0),
        ("MIG-6f3a,MIG-77aa", 1),
        ("NoDevFiles", 0),
    ],
)
def test_cuda_visible_devices(fake, monkeypatch, visible: str | None, count: int) -> None:
    fake("9.0", "9.0", "9.0")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of_jobs() == (Gpus(count, (9, 0)) if count else NONE)


def test_the_best_gpu_counts(fake) -> None:
    fake("8.0", "10.0", "9.0")
    assert gpus_of_jobs() == Gpus(3, (10, 0))


@pytest.mark.parametrize("answer", ["", "[N/A]", "9.0, GPU-1, more"])
def test_an_answer_that_says_nothing_leaves_it_to_the_job(fake, answer: str) -> None:
    fake(answer) if answer else fake("9.0", exit_code=9)
    assert gpus_of_jobs() is None


def test_a_torch_without_cuda_uses_no_gpu(fake, monkeypatch) -> None:
    fake("9.0")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+cpu")
    check_gpus(2, "sizes")
    with pytest.raises(ConfigError, match="there is none"):
        check_gpus(1, "sizes", FP8)


def test_precision_that_the_gpus_do_not_have(fake) -> None:
    fake("8.9")
    with pytest.raises(ConfigError, match=r"blockwise needs .* 9\.0, this one has 8\.9: choose delayed or"):
        check_gpus(1, "sizes", FP8)
    check_gpus(1, "sizes", mixed_precision("bf16_with_fp8_delayed_scaling_mixed"))
    check_gpus(1, "sizes", mixed_precision("fp16_mixed"))


def test_more_ranks_than_gpus(fake) -> None:
    fake("9.0", "9.0")
    check_gpus(2, "sizes")
    with pytest.raises(ConfigError, match=r"--tp and --dp make 4 ranks, .* this machine has 2: choose"):
        check_gpus(4, "--tp and --dp")


def test_hidden_gpus_let_any_number_of_ranks_run_on_the_cpu(fake, monkeypatch) -> None:
    fake("9.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpus(4, "sizes")
    with pytest.raises(ConfigError, match="there is none"):
        check_gpus(1, "sizes", FP8)


@pytest.mark.parametrize(
    ("variables", "elsewhere"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "gpu1"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "gpu1"}, False),
        ({"SLURMD_NODENAME": "gpu1"}, False),
    ],
    ids=["several nodes", "a login node's shell", "one node", "no allocation"],
)
def test_a_machine_that_does_not_compute_refuses_nothing(monkeypatch, variables, elsewhere: bool) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert gpus_of_jobs() == (None if elsewhere else NONE)


@pytest.mark.parametrize("tool", ["use_nsys_profiler", "record_memory_history"])
def test_tools_that_look_at_a_gpu(fake, tool: str) -> None:
    profiling = ProfilingConfig(output="profile", **{tool: True})
    with pytest.raises(ConfigError, match=rf"profiling\.{tool} looks at a GPU, and there is none: set it to"):
        check_gpus(1, "sizes", profiling=profiling)
    check_gpus(1, "sizes", profiling=ProfilingConfig(use_pytorch_profiler=True))
    fake("9.0")
    check_gpus(1, "sizes", profiling=profiling)


def test_who_needs_no_gpu_does_not_wait_for_the_driver(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n: > {tmp_path}/asked\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    check_gpus(1, "sizes", mixed_precision("bf16_mixed"))
    assert not (tmp_path / "asked").exists()
    check_gpus(2, "sizes")
    assert (tmp_path / "asked").exists()
