"""The parity job: do two checkpoints say the same, at every position of several prompts?

Each end is a Hugging Face folder, computed by transformers on the first rank, or a Megatron folder, computed
by all ranks together. Both compute in one dtype, whatever their weights are stored in.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bridge import distributed, live_checkpoint
from bridge.errors import InputError
from bridge.families import provider_of
from bridge.gates import LogitsMetrics, judge_logits, thresholds_for
from bridge.hf_checkpoint import read_config
from bridge.logits import Prompts, hf_logits, megatron_logits
from bridge.megatron_checkpoint import is_megatron_checkpoint, read_model, resolve_checkpoint
from bridge.provider import GPTModelProvider

TOP = 5


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Compare the ends `a` and `b`; a failed gate is a result with "passed": false, not an error."""
    started = time.monotonic()
    thresholds_for(config["dtype"])
    if config["dtype"] == "float32":
        # Transformer Engine multiplies float32 matrices in TF32, whose 11 bits no float32 gate lets pass.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    a, b = Path(config["a"]), Path(config["b"])
    layout = layout_of(config)
    distributed.initialize(layout, config.get("seed", distributed.DEFAULT_SEED))
    prompts = prompts_of(config, vocab_size=min(describe(a).vocab_size, describe(b).vocab_size))
    sides = [end_logits(end, prompts, layout) for end in (a, b)]
    report: dict[str, Any] = {}
    if torch.distributed.get_rank() == 0:
        rows = compare(prompts, *sides)
        write_table(rows, config.get("table"))
        report = {
            "gate": judge_logits(summarize(rows), config["dtype"]),
            "dtype": config["dtype"],
            "num_positions": len(rows),
            "seconds": time.monotonic() - started,
        }
    torch.distributed.barrier()
    distributed.finalize()
    return report


def layout_of(config: dict[str, Any]) -> GPTModelProvider:
    """Return a provider that says only how the Megatron ends are laid out and computed."""
    return GPTModelProvider(
        tensor_model_parallel_size=config.get("tensor_model_parallel_size", 1),
        pipeline_model_parallel_size=config.get("pipeline_model_parallel_size", 1),
        params_dtype=config["dtype"],
    )


def describe(end: Path) -> GPTModelProvider:
    """Describe the model of either kind of folder."""
    if is_megatron_checkpoint(end):
        return read_model(resolve_checkpoint(end))
    return provider_of(read_config(end))


def prompts_of(config: dict[str, Any], vocab_size: int) -> Prompts:
    """Return the given prompts, those of a JSON file, or random ones that depend on the seed alone."""
    prompts = config.get("prompts")
    if prompts is None and config.get("prompts_file"):
        prompts = json.loads(Path(config["prompts_file"]).read_text())
    if prompts is None:
        generator = torch.Generator().manual_seed(config.get("seed", distributed.DEFAULT_SEED))
        shape = (config.get("num_prompts", 4), config.get("prompt_length", 64))
        prompts = torch.randint(vocab_size, shape, generator=generator).tolist()
    if not prompts or not all(prompts):
        raise InputError("there are no prompts to compare: give lists of token ids")
    if (largest := max(map(max, prompts))) >= vocab_size:
        raise InputError(f"token {largest} of a prompt is outside the vocabulary of {vocab_size}")
    return prompts


def end_logits(end: Path, prompts: Prompts, layout: GPTModelProvider) -> list[torch.Tensor]:
    """Return the logits of one end; for a Hugging Face end only the first rank has any."""
    if not is_megatron_checkpoint(end):
        first = torch.distributed.get_rank() == 0
        return hf_logits(end, prompts, layout.params_dtype) if first else []
    provider = laid_out(describe(end), layout)
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, perform_initialization=False)
    live_checkpoint.load_checkpoint(chunks, resolve_checkpoint(end))
    return megatron_logits(chunks, provider, prompts)


def laid_out(provider: GPTModelProvider, layout: GPTModelProvider) -> GPTModelProvider:
    """Give a checkpoint's model this job's layout, without what only training needs."""
    provider.tensor_model_parallel_size = layout.tensor_model_parallel_size
    provider.pipeline_model_parallel_size = layout.pipeline_model_parallel_size
    provider.virtual_pipeline_model_parallel_size = None
    provider.context_parallel_size = provider.expert_model_parallel_size = 1
    provider.expert_tensor_parallel_size = None
    provider.sequence_parallel = False
    provider.params_dtype = layout.params_dtype
    provider.recompute_granularity = provider.recompute_method = provider.recompute_num_layers = None
    return provider


def compare(prompts: Prompts, a: list[torch.Tensor], b: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Return a row of differences for every prompt and position."""
    rows = []
    for number, (prompt, left, right) in enumerate(zip(prompts, a, b, strict=True)):
        columns = position_metrics(left, right)
        for position, token in enumerate(prompt):
            values = {name: column[position].item() for name, column in columns.items()}
            rows.append({"prompt": number, "position": position, "token": token, **values})
    return rows


def position_metrics(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return for [positions, vocabulary] of logits one value a position for each metric."""
    if a.shape != b.shape:
        raise InputError(f"the two ends have vocabularies of {a.shape[-1]} and {b.shape[-1]}: not one model")
    difference = (a - b).abs()
    log_a, log_b = functional.log_softmax(a, -1), functional.log_softmax(b, -1)
    top = min(TOP, a.shape[-1])
    top_a, top_b = a.topk(top).indices, b.topk(top).indices
    return {
        "max_abs": difference.amax(-1),
        "mean_abs": difference.mean(-1),
        "kl": functional.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1).clamp(min=0),
        "top1": a.argmax(-1),
        "top1_other": b.argmax(-1),
        "top5_shared": (top_a[:, :, None] == top_b[:, None, :]).any(-1).float().mean(-1),
        "cosine": functional.cosine_similarity(a.double(), b.double(), dim=-1),
        "scale": torch.maximum(a.abs().amax(-1), b.abs().amax(-1)),
    }


def summarize(rows: list[dict[str, Any]]) -> LogitsMetrics:
    """Reduce the rows to the gate's metrics; a NaN anywhere stays a NaN."""
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    return LogitsMetrics(
        max_abs=columns["max_abs"].max().item(),
        mean_abs=columns["mean_abs"].mean().item(),
        kl=columns["kl"].max().item(),
        top1_agreement=(columns["top1"] == columns["top1_other"]).double().mean().item(),
        top5_agreement=columns["top5_shared"].mean().item(),
        cosine=columns["cosine"].min().item(),
        scale=columns["scale"].max().item(),
    )


def write_table(rows: list[dict[str, Any]], path: str | None) -> None:
    if path is not None:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
