"""How fast a run is: tokens and model FLOP/s of one GPU, its share of the chip's peak, memory, parts."""

from typing import TYPE_CHECKING, Any

import torch

from bridge.distributed import device
from training.flops import flops_per_token
from training.pipeline import highest_of_all_ranks

if TYPE_CHECKING:
    from training.callbacks import Step
    from training.setup import Run

# TFLOP/s of a large bf16 matrix product on random data, by torch's name of the device. The H200's was
# measured on 8192 x 8192 matrices with torch 2.11 (measure_peak below); its datasheet says 989.
MEASURED_PEAKS = {"NVIDIA H200": 790.0}
GIB = 2**30


def throughput(run: "Run", step: "Step") -> dict[str, float]:
    """Return what the iteration that has just ended says about speed and memory; all ranks ask together."""
    train, model = run.config.train, run.config.model
    ranks = torch.distributed.get_world_size()
    tokens = train.global_batch_size * model.seq_length / step.seconds
    tflops = tokens / ranks * flops_per_token(model).training / 1e12
    return {
        "tokens_per_second": tokens,
        "tokens_per_second_per_gpu": tokens / ranks,
        "tflops_per_gpu": tflops,
        **peak_share(run.config.logger.peak_tflops, tflops),
        **peak_memory(),
        **{f"{name}_seconds": seconds for name, seconds in part_seconds(step.spans).items()},
    }


def peak_share(peak_tflops: float | None, tflops: float) -> dict[str, float]:
    """Return the share of the peak, if one is given or known for this GPU."""
    if peak_tflops is None and torch.cuda.is_available():
        peak_tflops = MEASURED_PEAKS.get(torch.cuda.get_device_name())
    return {"peak_share": tflops / peak_tflops} if peak_tflops else {}


def peak_memory() -> dict[str, float]:
    """Return the most memory that any rank's tensors have taken on its GPU, in GiB; a collective."""
    if not torch.cuda.is_available():
        return {}
    return {"peak_memory_gib": highest_of_all_ranks(torch.cuda.max_memory_allocated() / GIB)}


def part_seconds(spans: dict[str, float]) -> dict[str, float]:
    """Return seconds by part; "backward" is the rest of the batch, with waits for other stages."""
    batch, forward, data = (spans.get(name, 0.0) for name in ("batch", "forward", "data"))
    # on a GPU data are fetched while it computes
    rest = batch - forward - (data if device().type == "cpu" else 0.0)
    return {"data": data, "forward": forward, "backward": max(0.0, rest), "optimizer": spans["optimizer"]}


def measure_peak(size: int = 8192, products: int = 10) -> float:
    """Return the TFLOP/s of this GPU's bf16 matrix product of `size` x `size` matrices on random data."""
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(products):
        a @ b
    end.record()
    end.synchronize()
    return 2 * size**3 * products / (begin.elapsed_time(end) / 1000) / 1e12


def summary(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of every measurement over some iterations' lines."""
    names = [name for name, value in lines[0].items() if isinstance(value, float)]
    return {name: torch.tensor([line[name] for line in lines]).median().item() for name in names}
