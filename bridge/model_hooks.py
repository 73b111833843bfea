"""What a decoder computes beside Megatron Core's modules, as hooks on them: scales, caps, a rope by layer."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from bridge.core_attention import positions_of_rank
from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider


def add_hooks(model: GPTModel, provider: GPTModelProvider) -> None:
    """Hook the computations that a provider asks for into one model chunk, once."""
    if provider.embedding_scale is not None and model.pre_process:
        scale_embedding(model, provider.embedding_scale)
    if provider.rope_local_parameters is not None:
        choose_rope(model, provider)
    if (beta := provider.rope_parameters.get("llama_4_scaling_beta")) is not None:
        scale_queries(model, beta, provider.rope_parameters["original_max_position_embeddings"])
    if provider.final_logit_softcapping is not None and model.post_process:
        cap_logits(model, provider.final_logit_softcapping)


def scale_embedding(model: GPTModel, scale: float) -> None:
    """Multiply by the scale as transformers does, rounded to the weights' dtype (Gemma)."""

    def multiply(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(scale, dtype=output.dtype, device=output.device)

    model.embedding.register_forward_hook(multiply)


def cap_logits(model: GPTModel, cap: float) -> None:
    """Bound the output layer's logits to (-cap, cap)."""

    def bound(module: torch.nn.Module, inputs: Any, outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = outputs
        return cap * torch.tanh(logits / cap), bias

    model.output_layer.register_forward_hook(bound)


def choose_rope(model: GPTModel, provider: GPTModelProvider) -> None:
    """Give each layer its own angles of the two that `DecoderRotaryEmbedding` makes."""
    for layer in model.decoder.layers:
        local = is_layer_window_attention(
            provider.window_size, provider.window_attn_skip_freq, layer.layer_number
        )

        def choose(module: Any, args: Any, kwargs: dict[str, Any], number: int = int(local)) -> Any:
            angles = kwargs["rotary_pos_emb"]
            return args, {**kwargs, "rotary_pos_emb": angles[:, number : number + 1]}

        layer.self_attention.register_forward_pre_hook(choose, with_kwargs=True)


def scale_queries(model: GPTModel, beta: float, original_length: int) -> None:
    """Multiply turned queries by `position_scale`."""

    def multiply(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        query, *others = args
        positions = query_positions(query, kwargs.get("packed_seq_params"))
        scale = position_scale(positions, beta, original_length)
        return (query * scale.to(query.dtype).view(-1, *[1] * (query.dim() - 1)), *others), kwargs

    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(multiply, with_kwargs=True)


def position_scale(positions: Tensor, beta: float, original_length: int) -> Tensor:
    """Return 1 + beta log(1 + floor(position / original_length)), by which Llama 4 lets queries grow.

    transformers/models/ministral3/modeling_ministral3.py, get_llama_4_attn_scale.
    """
    return 1 + beta * torch.log(1 + torch.floor(positions / original_length))


def query_positions(query: Tensor, packed: PackedSeqParams | None) -> Tensor:
    """Return each query's position in its own sequence; queries are on axis 0."""
    ranks, rank = (
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
    )
    positions = positions_of_rank(query.size(0), rank, ranks, query.device)
    if packed is None:
        return positions
    if ranks > 1:
        raise ConfigError(
            "queries of packed sequences have no known position in context parallelism: set"
            " context_parallel_size to 1"
        )
    starts = packed.cu_seqlens_q.long()
    return positions - starts[torch.bucketize(positions, starts[1:], right=True)]
