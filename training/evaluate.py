"""The job that measures a checkpoint's loss on the text that no training has read: the test split."""

import math
from pathlib import Path
from typing import Any

import torch

from bridge import distributed, live_checkpoint
from bridge.errors import ConfigError
from bridge.megatron_checkpoint import read_model, resolve_checkpoint
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
    provider = laid_out(read_model(folder), config)
    distributed.initialize(provider)
    if torch.distributed.get_world_size() != provider.model_parallel_size:
        raise ConfigError(
            f"{torch.distributed.get_world_size()} ranks hold more than one copy of the model:"
            f" start {provider.model_parallel_size}"
        )
    loss, num_tokens = measure(provider, folder, config)
    return {"loss": loss, "num_tokens": num_tokens, "perplexity": math.exp(loss)}


def laid_out(provider: GPTModelProvider, config: dict[str, Any]) -> GPTModelProvider:
    """Give the checkpoint's model this job's layout; its weights keep their precision."""
    provider.tensor_model_parallel_size = config.get("tensor_model_parallel_size", 1)
    provider.pipeline_model_parallel_size = config.get("pipeline_model_parallel_size", 1)
    provider.virtual_pipeline_model_parallel_size = None
    provider.context_parallel_size = provider.expert_model_parallel_size = 1
    provider.expert_tensor_parallel_size = None
    provider.sequence_parallel = False
    provider.seq_length = config["seq_length"]
    return provider


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
    results = run_batch(
        forward_step,
        chunks,
        [batches(dataset, consumed_samples=0, micro_batch_size=1)],
        num_microbatches=min(config.get("num_batches") or len(dataset), len(dataset)),
        micro_batch_size=1,
        seq_length=provider.seq_length,
        forward_only=True,
    )
    total, num_tokens = sums_of_all_ranks(results).tolist()
    return total / num_tokens, int(num_tokens)
