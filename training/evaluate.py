"""The job that measures a checkpoint's loss on the text that no training has read: the test split."""

import math
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils.data import Subset

from bridge import check_layout, distributed, live_checkpoint
from bridge.ends import describe
from bridge.errors import ConfigError
from bridge.megatron_checkpoint import resolve_checkpoint
from bridge.provider import GPTModelProvider
from training.config import DatasetConfig
from training.data import SAMPLE_INDICES, batches, build_datasets
from training.gpt_step import forward_step
from training.pipeline import run_batch, sums_of_all_ranks


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Run the job in a process group of its own."""
    report = evaluate(config)
    distributed.finalize()
    return report


def evaluate(config: dict[str, Any]) -> dict[str, Any]:
    """Measure the mean loss of "checkpoint" over "num_batches" samples of "dataset", by default over all."""
    folder = resolve_checkpoint(Path(config["checkpoint"]))
    sizes = {name: config.get(name, 1) for name in check_layout.SIZES}
    provider = check_layout.laid_out(describe(folder), sizes)
    provider.seq_length = config["seq_length"]
    distributed.initialize(provider)
    if torch.distributed.get_world_size() != check_layout.num_ranks(sizes):
        raise ConfigError(
            f"{torch.distributed.get_world_size()} ranks are not those of the layout:"
            f" start {check_layout.num_ranks(sizes)}"
        )
    loss, num_tokens = measure(provider, folder, config)
    return {"loss": loss, "num_tokens": num_tokens, "perplexity": math.exp(loss)}


@torch.no_grad()
def measure(provider: GPTModelProvider, folder: Path, config: dict[str, Any]) -> tuple[float, int]:
    """Return the mean loss over the tokens of the samples, and their number."""
    dataset = build_datasets(
        DatasetConfig(
            blend=[config["dataset"]], path_to_cache=str(Path(config["report"]).parent / SAMPLE_INDICES)
        ),
        {"test": None},
        provider.seq_length,
        provider.vocab_size,
    )["test"]
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, perform_initialization=False)
    live_checkpoint.load_checkpoint(chunks, folder)
    for chunk in chunks:
        chunk.eval()
    num_samples = min(config.get("num_batches") or len(dataset), len(dataset))
    copies = parallel_state.get_data_parallel_world_size()
    # of layers without experts there may be copies, which take turns: each then gets every sample
    samples = Subset(dataset, [number for number in range(num_samples) for _ in range(copies)])
    results = run_batch(
        forward_step,
        chunks,
        [batches(samples, consumed_samples=0, micro_batch_size=1)],
        num_microbatches=num_samples,
        micro_batch_size=1,
        seq_length=provider.seq_length,
        forward_only=True,
    )
    total, num_tokens = sums_of_all_ranks(results).tolist()
    return total / num_tokens, int(num_tokens) // copies
