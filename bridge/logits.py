"""Logits of one checkpoint for a list of prompts, by transformers or by Megatron Core."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from bridge.distributed import device
from bridge.provider import GPTModelProvider

Prompts = list[list[int]]


@torch.no_grad()
def hf_logits(folder: Path, prompts: Prompts, dtype: str) -> list[torch.Tensor]:
    """Return [positions, vocabulary] in float32 on the CPU for each prompt, computed by transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",  # the plain formula, which defines what the model says
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model.eval().to(device())
    return [model(torch.tensor([prompt], device=device())).logits[0].float().cpu() for prompt in prompts]


@torch.no_grad()
def megatron_logits(
    chunks: Sequence[torch.nn.Module], provider: GPTModelProvider, prompts: Prompts
) -> list[torch.Tensor]:
    """Return the same as `hf_logits`, computed by all ranks of a sharded model together and known to each."""
    assert len(chunks) == 1, "an interleaved pipeline is for training"
    chunks[0].eval()
    return [prompt_logits(chunks[0], provider, prompt) for prompt in prompts]


def prompt_logits(model: torch.nn.Module, provider: GPTModelProvider, prompt: list[int]) -> torch.Tensor:
    """Run one prompt through the pipeline and give its logits to every rank."""
    shape = (1, len(prompt), provider.padded_vocab_size)
    found: list[torch.Tensor] = []
    get_forward_backward_func()(
        forward_step_func=forward_step(prompt, found),
        data_iterator=None,
        model=model,
        num_microbatches=1,
        seq_length=len(prompt),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if parallel_state.is_pipeline_last_stage():
        logits = gather_from_tensor_model_parallel_region(found[0]).float().contiguous()
    else:
        logits = torch.empty(shape, dtype=torch.float32, device=device())
    torch.distributed.broadcast(logits, src=first_rank_of_last_stage())
    return logits[0, :, : provider.vocab_size].cpu()


def forward_step(prompt: list[int], found: list[torch.Tensor]) -> Any:
    """Make the function that Megatron's schedules call; the last stage leaves its logits in `found`."""
    tokens = torch.tensor([prompt], device=device())
    positions = torch.arange(len(prompt), device=device())[None]

    def keep(output: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
        found.append(output)
        return output

    def step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        # Megatron's attention is causal by itself; it takes no mask.
        return model(tokens, positions, None), keep

    return step


def first_rank_of_last_stage() -> int:
    """Pipeline stages are the outermost axis of Megatron's order of ranks (tp-cp-ep-dp-pp)."""
    ranks = torch.distributed.get_world_size()
    return ranks - ranks // parallel_state.get_pipeline_model_parallel_world_size()
