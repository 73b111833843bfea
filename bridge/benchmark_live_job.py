"""The job of `bridge.benchmark_live`: one model, every way to fill it and to make its tensors whole."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from transformers import AutoModelForCausalLM

from bridge import distributed, restricted_load
from bridge.families import plan_weights, provider_of
from bridge.gather_plan import plan_pieces
from bridge.gathering import rows_of_piece, target_of_piece
from bridge.hf_checkpoint import read_config
from bridge.live_checkpoint import load_checkpoint, load_model_state, model_state
from bridge.live_weights import export_hf_weights
from bridge.provider import GPTModelProvider
from bridge.shards import blocks_by_tensor, gather_boxes, overlap, rows_of_block, shards_of

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
    ways = [*loads(chunks, hf, megatron), *exports(chunks, provider)]
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


def loads(chunks: Chunks, hf: Path, megatron: Path) -> Iterator[Way]:
    ours = "load Megatron"

    def through_megatron(load: Callable[..., Any]) -> Callable[[], None]:
        return lambda: load_model_state(chunks, load(model_state(chunks), str(megatron)))

    yield ours, None, lambda: load_checkpoint(chunks, megatron)
    yield "load Hugging Face", None, lambda: load_checkpoint(chunks, hf)
    yield "restricted_load.load", ours, through_megatron(restricted_load.load)
    yield "dist_checkpointing.load", ours, through_megatron(dist_checkpointing.load)
    yield (
        "from_pretrained",
        "load Hugging Face",
        lambda: AutoModelForCausalLM.from_pretrained(hf, dtype="auto"),
    )


def load_from_pretrained(chunks: Chunks, hf: Path) -> None:
    """Let transformers load the whole model on every rank, and copy this rank's parts out of it."""
    weights = AutoModelForCausalLM.from_pretrained(hf, dtype="auto").state_dict()
    plan = plan_weights(provider_of(read_config(hf)))
    blocks = blocks_by_tensor(plan)
    for box, data, *_ in shards_of(chunks):
        for block in blocks[box.key, box.lead]:
            first, last = overlap(block, box)
            if first < last:
                rows = rows_of_block(weights[block.hf], plan, block)
                rows = rows[first - block.megatron_row : last - block.megatron_row]
                for axis, (start, size) in enumerate(zip(box.offsets[1:], box.sizes[1:], strict=True), 1):
                    rows = rows.narrow(axis, start, size)
                data[first - box.offsets[0] : last - box.offsets[0]].copy_(rows)


def exports(chunks: Chunks, provider: GPTModelProvider) -> Iterator[Way]:
    ours = "export"
    yield ours, None, lambda: drain(export_hf_weights(chunks, provider))
    yield "export to one rank", None, lambda: drain(export_hf_weights(chunks, provider, first_rank_only=True))
    yield "export tensor by tensor", ours, lambda: drain(export_by_tensor(chunks, provider))


def drain(weights: Iterator[Any]) -> None:
    for _ in weights:
        pass


def export_by_tensor(chunks: Chunks, provider: GPTModelProvider) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather one tensor after the other, a broadcast for each part, as one would write it first."""
    shards, plan = shards_of(chunks), plan_weights(provider)
    held, own = gather_boxes(shards), {shard.box: shard.data for shard in shards}
    pieces = plan_pieces(plan, held, plan.hf_shapes)
    for name, parts in pieces.items():
        weight = torch.empty(plan.hf_shapes[name], dtype=parts[0].dtype, device=distributed.device())
        for piece in parts:
            rows = torch.empty(piece.shape, dtype=piece.dtype, device=weight.device)
            if piece.owner == torch.distributed.get_rank():
                rows.copy_(rows_of_piece(own, piece))
            torch.distributed.broadcast(rows, src=piece.owner)
            target_of_piece(weight, plan, piece).copy_(rows)
        yield name, weight


def measured(run: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds until all ranks are done, and how much memory this one took beside the model, in MiB."""
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
