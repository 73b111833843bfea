"""Logits of one checkpoint for a list of prompts, by transformers or by Megatron Core."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from bridge.distributed import device
from bridge.errors import ConfigError, GateError
from bridge.families import provider_of
from bridge.hf_checkpoint import read_config
from bridge.prompts import Prompts
from bridge.provider import GPTModelProvider
from bridge.quantization import without_quantization


class Loaded(NamedTuple):
    """A model of transformers and what its loader complains of: names of tensors by what is wrong."""

    model: Any
    complaints: dict[str, list[str]]


def load_hf(folder: Path, dtype: str) -> Loaded:
    """Load a Hugging Face folder by transformers in `dtype`, on this rank's device.

    What transformers cannot load, for whatever reason, is a GateError.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation="eager",  # the plain formula, which defines what the model says
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **loading_options(folder, dtype),
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise GateError(f"transformers cannot load {folder}: {type(error).__name__}: {reason}") from error
    if dtype == "float32":
        model.float()
    complaints = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys")}
    return Loaded(model.eval().to(device()), complaints)


def loading_options(folder: Path, dtype: str) -> dict[str, Any]:
    """Return in which dtype transformers loads: quantised weights in the one that they are converted to."""
    config = read_config(folder)
    if "quantization_config" not in config:
        return {"dtype": getattr(torch, dtype)}
    from transformers.quantizers.auto import AutoQuantizationConfig

    settings = AutoQuantizationConfig.from_dict({**config["quantization_config"], "dequantize": True})
    meant = provider_of(without_quantization(config)).params_dtype
    return {"dtype": getattr(torch, meant), "quantization_config": settings}


@torch.no_grad()
def hf_logits(folder: Path, prompts: Prompts, dtype: str) -> list[torch.Tensor]:
    """Return [positions, vocabulary] in float32 on the CPU for each prompt, computed by transformers."""
    model = load_hf(folder, dtype).model
    return [model(torch.tensor([prompt], device=device())).logits[0].float().cpu() for prompt in prompts]


@torch.no_grad()
def megatron_logits(
    chunks: Sequence[torch.nn.Module], provider: GPTModelProvider, prompts: Prompts
) -> list[torch.Tensor]:
    """Return the same as `hf_logits`, computed by all ranks of a sharded model together and known to each."""
    if len(chunks) > 1:
        raise ConfigError(
            "an interleaved pipeline is for training: leave out virtual_pipeline_model_parallel_size"
        )
    chunks[0].eval()
    return [everywhere(run_prompt(chunks[0], provider, prompt), provider, prompt) for prompt in prompts]


def everywhere(logits: torch.Tensor | None, provider: GPTModelProvider, prompt: list[int]) -> torch.Tensor:
    """Give the last pipeline stage's logits to every rank, in float32 on the CPU."""
    if logits is None:
        logits = torch.empty(len(prompt), provider.vocab_size, device=device())
    logits = logits.float().contiguous()
    torch.distributed.broadcast(logits, src=first_rank_of_last_stage())
    return logits.cpu()


@torch.no_grad()
def run_prompt(model: torch.nn.Module, provider: GPTModelProvider, prompt: list[int]) -> torch.Tensor | None:
    """Run one prompt through the pipeline; the ranks of its last stage return [positions, vocabulary]."""
    tokens = filled_up(prompt, provider)
    found: list[torch.Tensor] = []
    get_forward_backward_func()(
        forward_step_func=forward_step(tokens, found),
        data_iterator=None,
        model=model,
        num_microbatches=1,
        seq_length=len(tokens),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel_state.is_pipeline_last_stage():
        return None
    logits = gather_from_tensor_model_parallel_region(found[0])
    return logits[0, : len(prompt), : provider.vocab_size]


def filled_up(prompt: list[int], provider: GPTModelProvider) -> list[int]:
    """Sequence parallelism cuts a prompt in equal parts; what is put after its end changes nothing before."""
    parts = provider.tensor_model_parallel_size if provider.sequence_parallel else 1
    return prompt + [0] * (-len(prompt) % parts)


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


def is_first_of_stage() -> bool:
    """Say whether this rank speaks for its pipeline stage."""
    ranks = torch.distributed.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
    return torch.distributed.get_rank() % ranks == 0
