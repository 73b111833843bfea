"""A job of the tests: a dense decoder with latent attention on two tensor-parallel ranks."""

from typing import Any

import torch
from bridge_jobs.layouts_job import LABELS, TOKENS, forward_step
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from bridge.distributed import leave_model_parallel
from bridge.provider import GPTModelProvider

DOWN_PROJECTION = "linear_kv_down_proj.weight"
SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "init_method_std": 0.1,
}


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Compare gradients with and without sequence parallelism; the former are judged elsewhere."""
    cut, weights = gradients(sequence_parallel=True)
    whole, _ = gradients(sequence_parallel=False, weights=weights)
    difference = torch.stack([(whole[n] - cut[n]).abs().max() / cut[n].abs().max() for n in cut]).max()
    torch.distributed.all_reduce(difference, torch.distributed.ReduceOp.MAX)
    return {"difference": difference.item(), "alike": all(map(same_on_both_ranks, down_projections(weights)))}


def gradients(
    sequence_parallel: bool, weights: dict[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return this rank's gradients of one step, and the weights, which are random unless they are given."""
    provider = GPTModelProvider(**SIZES, tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    model = provider.provide_distributed_model()
    model[0].config.finalize_model_grads_func = finalize_model_grads
    parameters = dict(model[0].module.named_parameters())
    for name, weight in (weights or {}).items():
        parameters[name].data.copy_(weight)
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(zip(TOKENS, LABELS, strict=True)),
        model=model,
        num_microbatches=len(TOKENS),
        seq_length=TOKENS.shape[-1],
        micro_batch_size=1,
        forward_only=False,
    )
    leave_model_parallel()
    return (
        {name: parameter.main_grad.clone() for name, parameter in parameters.items()},
        {name: parameter.detach().clone() for name, parameter in parameters.items()},
    )


def down_projections(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [weight for name, weight in weights.items() if name.endswith(DOWN_PROJECTION)]


def same_on_both_ranks(weight: torch.Tensor) -> bool:
    parts = [torch.empty_like(weight) for _ in range(2)]
    torch.distributed.all_gather(parts, weight)
    return torch.equal(*parts)
