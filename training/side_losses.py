"""Losses beside that of the next token: of the experts' balance and logits, and of prediction layers.

Their gradients arise inside the model. Megatron Core adds up their values, before any coefficient, over
layers and micro-batches on each rank (transformer/moe/moe_utils.py, save_to_aux_losses_tracker, and
transformer/multi_token_prediction.py, MTPLossLoggingHelper), for its caller to read and clear.
"""

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from bridge.distributed import device
from bridge.provider import GPTModelProvider

BALANCE = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
Z_LOSS = "z_loss"
VALUES = "values"


def side_losses(model: GPTModelProvider, num_microbatches: int) -> dict[str, float]:
    """Return the means of the iteration's side losses, equal on all ranks, which ask together and once."""
    expert_names, num_predictions = expert_losses(model), model.mtp_num_layers or 0
    if not expert_names and not num_predictions:
        return {}
    sums = torch.stack([*expert_sums(expert_names), *prediction_sums(num_predictions)]).double()
    torch.distributed.all_reduce(sums)
    clear()
    divisors = [expert_divisor(model, name) for name in expert_names] + [copies()] * num_predictions
    names = [*expert_names, *(f"mtp_{layer + 1}_loss" for layer in range(num_predictions))]
    values = zip(names, sums.tolist(), divisors, strict=True)
    return {name: value / divisor / num_microbatches for name, value, divisor in values}


def expert_losses(model: GPTModelProvider) -> list[str]:
    """Name the losses that the routers of a model have."""
    if not num_routers(model):
        return []
    balance = BALANCE.get(model.moe_router_load_balancing_type) if model.moe_aux_loss_coeff else None
    return [*([balance] if balance else []), *([Z_LOSS] if model.moe_z_loss_coeff is not None else [])]


def num_routers(model: GPTModelProvider) -> int:
    """Count the layers with experts; a prediction layer is like the decoder's last one."""
    return sum(model.moe_layers) + (model.mtp_num_layers or 0) * model.moe_layers[-1]


def expert_sums(names: list[str]) -> list[torch.Tensor]:
    """Return the sums of this rank's routers; a pipeline stage may have none."""
    tracker = get_moe_layer_wise_logging_tracker()
    return [tracker[name][VALUES].sum() if name in tracker else zero() for name in names]


def prediction_sums(num_layers: int) -> list[torch.Tensor]:
    """Return the sums of each prediction layer, which are all in the last stage."""
    found = MTPLossLoggingHelper.tracker.get(VALUES)
    return [zero() for _ in range(num_layers)] if found is None else list(found)


def zero() -> torch.Tensor:
    return torch.zeros((), device=device())


def expert_divisor(model: GPTModelProvider, name: str) -> float:
    """Say how many routers' values the sum over all ranks is of.

    Ranks that share sequences have parts of a balancing loss, and those of the global one parts of all
    sequences' too; each rank has a z-loss of its own tokens.
    """
    parts = parallel_state.get_tensor_and_context_parallel_world_size() if name != Z_LOSS else 1
    all_parts = copies() if name == BALANCE["global_aux_loss"] else parts
    return num_routers(model) * copies() / all_parts


def copies() -> int:
    """Count the ranks of one pipeline stage."""
    return torch.distributed.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()


def clear() -> None:
    """Forget what has been added up, and for how many layers: a process may train another model."""
    get_moe_layer_wise_logging_tracker().clear()
    MTPLossLoggingHelper.tracker.clear()
