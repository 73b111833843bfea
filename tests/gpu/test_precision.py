"""FP8 and fp16 on a GPU: curves near bf16's, checkpoints that go on, and exports in 16 bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.test_devices import run_job, small_model, training_job  # noqa: F401
from safetensors import safe_open

from bridge.exporter import export_checkpoint
from training.metrics import read_metrics
from training.precision import mixed_precision
from training.throughput import measure_peak

pytestmark = pytest.mark.gpu

FP8 = {
    "delayed": "bf16_with_fp8_delayed_scaling_mixed",
    "tensorwise": "bf16_with_fp8_current_scaling_mixed",
    "blockwise": "bf16_with_fp8_blockwise_mixed",
}


def precise_job(model: dict[str, Path], folder: Path, iterations: int, name: str, **changes: Any) -> dict:
    job = training_job(model, folder, iterations)
    # at the rate of the other tests the curve has a peak, in which rounding is amplified
    job["config"]["optimizer"]["lr"] = 3e-4
    section = {**vars(mixed_precision(name)), **changes}
    # the small model has few layers, of which none would be left in FP8
    job["config"]["mixed_precision"] = {**section, "first_last_layers_bf16": False}
    return job


def curve(folder: Path, key: str = "loss") -> dict[int, float]:
    return {line["iteration"]: line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line}


@pytest.fixture(scope="session")
def bf16(small_model: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:  # noqa: F811
    folder = tmp_path_factory.mktemp("bf16")
    job = precise_job(small_model, folder, 20, "bf16_mixed")
    job["config"]["logger"]["tensorboard_dir"] = str(folder / "tensorboard")
    run_job("training.pretrain", job, folder / "job")
    check_tensorboard(folder)
    return curve(folder)


def check_tensorboard(folder: Path) -> None:
    """The machines with GPUs have the package tensorboard, the others need not."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == pytest.approx(curve(folder), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *[(name, {}) for name in FP8.values()],
        (FP8["delayed"], {"fp8_param": True}),
        (FP8["tensorwise"], {"fp8_param": True}),
        # times the tokens of a micro-batch, over which the loss is summed: the largest without an overflow
        ("fp16_mixed", {"initial_loss_scale": 2.0**9}),
    ],
)
def test_a_run_resumes_near_bf16(name, changes, small_model, bf16, tmp_path):  # noqa: F811
    for part, iterations in (("a", 10), ("b", 20)):
        job = precise_job(small_model, tmp_path, iterations, name, **changes)
        run_job("training.pretrain", job, tmp_path / part)
    losses = curve(tmp_path)
    difference = max(abs(losses[n] - bf16[n]) for n in bf16)
    print(name, changes, difference, losses[10], losses[11], bf16[11])
    assert sorted(losses) == list(range(1, 21))
    assert difference < 0.1
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "hf")
    for file in (tmp_path / "hf").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(key)
                assert tensor.dtype in (torch.bfloat16, torch.float16), key
                assert tensor.isfinite().all(), key


def test_the_loss_scale_falls_and_is_kept(small_model, tmp_path):  # noqa: F811
    for part, iterations in (("a", 8), ("b", 10)):
        job = precise_job(small_model, tmp_path, iterations, "fp16_mixed", initial_loss_scale=2.0**12)
        run_job("training.pretrain", job, tmp_path / part)
    scales = curve(tmp_path, "loss_scale")
    print(scales)
    assert scales[10] == scales[9] == scales[8] < 2.0**12


def test_delayed_scaling_goes_on_where_it_was(small_model, tmp_path):  # noqa: F811
    """Twenty iterations and ten plus ten give the same bits in deterministic mode: no scale was lost."""
    for folder, parts in (("whole", (20,)), ("halves", (10, 20))):
        for iterations in parts:
            job = precise_job(small_model, tmp_path / folder, iterations, FP8["delayed"])
            job["config"]["train"]["deterministic_mode"] = True
            run_job("training.pretrain", job, tmp_path / folder / str(iterations))
    whole, halves = curve(tmp_path / "whole"), curve(tmp_path / "halves")
    print("whole", whole[11], whole[20], "halves", halves[11], halves[20])
    assert halves == whole


def test_peak_is_plausible():
    assert 100 < measure_peak(4096) < 2500
