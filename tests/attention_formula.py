"""Attention written out in full, to judge others by; every token's keys are listed one by one."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

SHAPES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
LENGTH, BATCH = 16, 2


def config(**values: Any) -> TransformerConfig:
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    options = {"attention_dropout": 0.0, **values}
    return TransformerConfig(**{name: SHAPES[name] for name in sizes}, **options)


def inputs(key_size: int = 8, value_size: int = 8, length: int = LENGTH) -> tuple[torch.Tensor, ...]:
    """Return query, key, value, sinks and a weight for each output, the same on every rank."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    heads, groups = SHAPES["num_attention_heads"], SHAPES["num_query_groups"]
    query, key = random(length, BATCH, heads, key_size), random(length, BATCH, groups, key_size)
    value, weight = random(length, BATCH, groups, value_size), random(length, BATCH, heads, value_size)
    return query, key, value, random(heads), weight


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    starts: tuple[int, ...] = (0,),
) -> torch.Tensor:
    """Return [sequence, batch, heads, channels]; packed sequences start at the positions `starts`."""
    repeats = query.size(2) // key.size(2)
    rows = []
    for position in range(len(query)):
        first = max(start for start in starts if start <= position)
        if window is not None:
            first = max(first, position - window[0])
        keys = key[first : position + 1].repeat_interleave(repeats, dim=2)
        values = value[first : position + 1].repeat_interleave(repeats, dim=2)
        logits = torch.einsum("bhc,sbhc->bhs", query[position], keys) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        exponentials = logits.exp()
        total = exponentials.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks.exp()[None, :, None]
        rows.append(torch.einsum("bhs,sbhc->bhc", exponentials / total, values))
    return torch.stack(rows)
