"""The job of `bridge.benchmark_live`: one model, every way to fill it and to make its tensors whole."""

import gc
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from transformers import AutoModelForCausalLM

from bridge import distributed, restricted_load
from bridge.families import plan_weights, provider_of
from bridge.hf_checkpoint import read_config
from bridge.live_checkpoint import load_checkpoint, load_model_state, model_state
from bridge.live_weights import export_hf_weights
from bridge.mapping import Block, WeightPlan
from bridge.provider import GPTModelProvider
from bridge.shards import (
    Box,
    GlobalTensor,
    blocks_by_tensor,
    gather_boxes,
    overlap,
    part_of,
    rows_of_block,
    shards_of,
)

STATUS = Path("/proc/self/status")  # of Linux
SECONDS_BETWEEN_SAMPLES = 0.01
MIB = 1 << 20

Chunks = list[torch.nn.Module]


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Return seconds (the median of "repeats") and the first rank's peak memory of each way."""
    hf, megatron = Path(config["hf"]), Path(config["megatron"])
    provider = provider_of(read_config(hf))
    for name, size in config["layout"].items():
        setattr(provider, name, size)
    provider.params_dtype = "bfloat16"
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, perform_initialization=False)
    ways = [*loads(chunks, provider, hf, megatron), *exports(chunks, provider)]
    times: dict[str, list[float]] = {what: [] for what, _, _ in ways}
    peaks: dict[str, float] = {}
    load_checkpoint(chunks, megatron)  # the model's memory is first touched here
    for _ in range(config["repeats"]):
        for what, _, run in ways:
            seconds, peaks[what] = measured(run)
            times[what].append(seconds)
    gigabytes = 2 * plan_weights(provider).num_parameters / 1e9
    distributed.finalize()
    return {
        "measured": [
            {
                "what": what,
                "beside": beside,
                "seconds": statistics.median(times[what]),
                "gigabytes": gigabytes,
                "peak_mib": peaks[what],
            }
            for what, beside, _ in ways
        ]
    }


Way = tuple[str, str | None, Callable[[], Any]]
"""What is measured, beside what it stands, and how."""


def loads(chunks: Chunks, provider: GPTModelProvider, hf: Path, megatron: Path) -> Iterator[Way]:
    ours = "load Megatron"

    def through_megatron(load: Callable[..., Any]) -> Callable[[], None]:
        return lambda: load_model_state(chunks, load(model_state(chunks), str(megatron)))

    yield ours, None, lambda: load_checkpoint(chunks, megatron)
    yield "load Hugging Face", None, lambda: load_checkpoint(chunks, hf)
    yield "restricted_load.load", ours, through_megatron(restricted_load.load)
    yield "dist_checkpointing.load", ours, through_megatron(dist_checkpointing.load)
    if not provider.num_moe_experts:  # transformers fuses the experts, whose names are then others
        yield (
            "from_pretrained and copy",
            "load Hugging Face",
            lambda: load_from_pretrained(chunks, provider, hf),
        )


def exports(chunks: Chunks, provider: GPTModelProvider) -> Iterator[Way]:
    one, every = "export to the first rank", "export to all ranks"
    yield every, None, lambda: drain(export_hf_weights(chunks, provider))
    yield one, None, lambda: drain(export_hf_weights(chunks, provider, first_rank_only=True))
    yield "export part by part", every, lambda: drain(export_by_part(chunks, provider))


def drain(weights: Iterator[Any]) -> None:
    for _ in weights:
        pass


def load_from_pretrained(chunks: Chunks, provider: GPTModelProvider, hf: Path) -> None:
    """Let transformers load the whole model on every rank, and copy this rank's parts out of it."""
    weights = AutoModelForCausalLM.from_pretrained(hf, dtype="auto").state_dict()
    plan = plan_weights(provider)
    blocks = blocks_by_tensor(plan)
    for box, data, *_ in shards_of(chunks):
        for rows, whole in in_both(box, data, blocks[box.key, box.lead], weights, plan):
            rows.copy_(whole)


def export_by_part(chunks: Chunks, provider: GPTModelProvider) -> Iterator[tuple[str, torch.Tensor]]:
    """Broadcast each rank's part of one tensor after the other, as one would write it first."""
    shards, plan, device = shards_of(chunks), plan_weights(provider), distributed.device()
    own = {shard.box: shard.data for shard in shards}
    owners = {box: rank for rank, boxes in reversed(list(enumerate(gather_boxes(shards)))) for box in boxes}
    boxes: dict[GlobalTensor, list[Box]] = defaultdict(list)
    for box in sorted(owners, key=lambda box: box[:3]):
        boxes[box.key, box.lead].append(box)
    for tensor, blocks in blocks_by_tensor(plan).items():
        weights = {
            name: torch.empty(plan.hf_shapes[name], dtype=boxes[tensor][0].dtype, device=device)
            for name in dict.fromkeys(block.hf for block in blocks)
        }
        for box in boxes[tensor]:
            is_owner = owners[box] == torch.distributed.get_rank()
            part = (
                own[box].contiguous() if is_owner else torch.empty(box.sizes, dtype=box.dtype, device=device)
            )
            torch.distributed.broadcast(part, src=owners[box])
            for rows, whole in in_both(box, part, blocks, weights, plan):
                whole.copy_(rows)
        yield from weights.items()


def in_both(
    box: Box, part: torch.Tensor, blocks: list[Block], weights: dict[str, torch.Tensor], plan: WeightPlan
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the rows of a rank's part and where whole Hugging Face tensors have them, block by block."""
    for block in blocks:
        first, last = overlap(block, box)
        if first < last:
            rows = part[first - box.offsets[0] : last - box.offsets[0]]
            offsets = (first - block.megatron_row, *box.offsets[1:])
            yield rows, part_of(rows_of_block(weights[block.hf], plan, block), offsets, rows.shape)


def measured(run: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds until all ranks are done, and how much memory this one took beside the model, in MiB."""
    gc.collect()  # what the way before has left, such as a whole model of transformers
    with PeakMemory() as memory:
        torch.distributed.barrier()
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        torch.distributed.barrier()
        seconds = time.perf_counter() - began
    return seconds, memory.added / MIB


class PeakMemory:
    """The most memory that a `with` block added: of the GPU, else of this process without mapped files."""

    added = 0

    def __enter__(self) -> "PeakMemory":
        self._done = threading.Event()
        self._before = memory_now()
        self._watch = threading.Thread(target=self._sample, daemon=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._watch.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_SAMPLES):
            self.added = max(self.added, memory_now() - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if torch.cuda.is_available():
            self.added = torch.cuda.max_memory_allocated() - self._before
        else:
            self._watch.join()


def memory_now() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10
