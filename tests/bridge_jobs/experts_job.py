"""A job of the tests: what experts exchange between two ranks of a tensor-parallel group."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from bridge import distributed
from bridge.layer_spec import layer_spec
from bridge.model import transformer_config
from bridge.provider import GPTModelProvider

SIZES = [3, 1]
NUM_TOKENS = 16


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the first rank found."""
    provider = GPTModelProvider(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=2,
        vocab_size=8,
        num_moe_experts=4,
        moe_aux_loss_coeff=0.5,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    distributed.initialize(provider.finalize())
    return {**uneven_parts(), "balance": balance_gradient(provider)}


def uneven_parts() -> dict[str, Any]:
    """Gather and scatter parts of different sizes, and weigh the result by the rank's number from 1 on."""
    rank, group = torch.distributed.get_rank(), parallel_state.get_tensor_model_parallel_group()
    part = torch.full((SIZES[rank], 2), float(rank + 1), requires_grad=True)
    gathered = gather_from_sequence_parallel_region(part, group=group, output_split_sizes=SIZES)
    scattered = reduce_scatter_to_sequence_parallel_region(gathered, group, SIZES)
    (scattered * (rank + 1)).sum().backward()
    assert part.grad is not None
    empty = gather_from_sequence_parallel_region(part[:0], group=group, output_split_sizes=[0, 0])
    assert empty.shape == (0, 2)
    return {"gathered": gathered.tolist(), "scattered": scattered.tolist(), "gradient": part.grad.tolist()}


def balance_gradient(provider: GPTModelProvider) -> list[list[list[float]]]:
    """Return the gradient of the balancing loss by Megatron on two ranks, and by the formula."""
    config = transformer_config(provider, calculate_per_token_loss=True)
    spec = layer_spec(provider, config).submodules.mlp.submodules
    router = spec.router(config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(NUM_TOKENS, 1, provider.hidden_size, generator=generator)
    weight = torch.randn(router.weight.shape, generator=generator)
    router.weight.data.copy_(weight)
    probabilities, _ = router(tokens.chunk(2)[torch.distributed.get_rank()])
    (0 * probabilities.sum()).backward()
    torch.distributed.all_reduce(router.weight.grad)  # as finalize_model_grads does
    found = router.weight.grad / NUM_TOKENS
    return [found.tolist(), expected_gradient(tokens[:, 0], weight, provider).tolist()]


def expected_gradient(tokens: torch.Tensor, weight: torch.Tensor, provider: GPTModelProvider) -> torch.Tensor:
    """Switch Transformer's loss, arXiv 2101.03961, equations 4 to 6."""
    weight.requires_grad_()
    scores = (tokens @ weight.T).softmax(dim=-1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(provider.moe_router_topk).indices, 1.0)
    share = chosen.mean(dim=0) / provider.moe_router_topk
    loss = provider.moe_aux_loss_coeff * scores.size(1) * (share * scores.mean(dim=0)).sum()
    return torch.autograd.grad(loss, weight)[0]
