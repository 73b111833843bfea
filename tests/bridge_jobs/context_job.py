"""A job of the tests: whole models with each sequence spread over two ranks, against every rank alone."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from bridge.core_attention import positions_of_rank
from bridge.distributed import leave_model_parallel
from bridge.families import provider_of
from bridge.hf_checkpoint import HfCheckpoint
from bridge.live_weights import load_hf_weights

# Longer than the windows and the original lengths of the small models.
LENGTH = 64
TOKENS, LABELS = (torch.arange(LENGTH)[None] * step % 151 for step in (7, 5))


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Return the relative difference of loss and gradients for each checkpoint."""
    return {name: measure(Path(path)) for name, path in config["checkpoints"].items()}


def measure(hf: Path) -> dict[str, float]:
    loss, gradients = loss_and_gradients(hf, 1)
    spread_loss, spread_gradients = loss_and_gradients(hf, 2)
    for tensor in (spread_loss, *spread_gradients.values()):
        torch.distributed.all_reduce(tensor)
    return {
        "loss": ((loss - spread_loss).abs() / loss).item(),
        "gradients": max(
            ((gradient - spread_gradients[name]).abs().max() / gradient.abs().max()).item()
            for name, gradient in gradients.items()
        ),
    }


def loss_and_gradients(hf: Path, ranks: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return this rank's share of the summed loss and of its gradients."""
    checkpoint = HfCheckpoint.open(hf)
    provider = provider_of(checkpoint.config)
    provider.params_dtype, provider.context_parallel_size = "float32", ranks
    provider.moe_aux_loss_coeff = 0.0
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, perform_initialization=False)
    load_hf_weights([model], provider, checkpoint)
    rank = parallel_state.get_context_parallel_rank()
    positions = positions_of_rank(LENGTH // ranks, rank, ranks)
    losses = model(TOKENS[:, positions], positions[None], None, labels=LABELS[:, positions])
    losses.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    leave_model_parallel()
    return losses.sum().detach(), gradients
