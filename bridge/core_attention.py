"""Attention in torch: what Megatron Core's own leaves to Transformer Engine, on a CPU as on a GPU.

Grouped queries, a sliding window in some layers, learnable sinks, capped logits, keys and values of different
sizes, context parallelism and packed sequences. Always causal: a token sees itself and earlier ones.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.nn import functional

from bridge.errors import ConfigError

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def positions_of_rank(length: int, rank: int, ranks: int, device: torch.device | None = None) -> Tensor:
    """Return the positions of the `length` tokens that one rank of a context parallel group holds.

    Megatron cuts a sequence into 2 * ranks chunks and gives rank r chunks r and 2 * ranks - 1 - r, so that
    all ranks have equal work under a causal mask (megatron/core/utils.py, get_batch_on_this_cp_rank).
    """
    if ranks == 1:
        return torch.arange(length, device=device)
    half = torch.arange(length // 2, device=device)
    return torch.cat([half + rank * len(half), half + (2 * ranks - 1 - rank) * len(half)])


def hidden_keys(queries: Tensor, keys: Tensor, window: tuple[int, int] | None) -> Tensor:
    """Return [queries, keys], true where a key's position is after the query's or before its window."""
    distance = queries[:, None] - keys[None, :]
    hidden = distance < 0
    return hidden if window is None or window[0] < 0 else hidden | (distance > window[0])


class CoreAttention(MegatronModule):
    """Softmax attention of this rank's heads; takes the place of Megatron's DotProductAttention.

    `softcap` bounds the scaled logits to (-softcap, softcap) by tanh (Gemma 2). If the config's softmax_type
    is "learnable", each head has an extra logit without a value, the sink `softmax_offset` (gpt-oss).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group, self.cp_group = groups.tp, groups.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size if windowed else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softcap = softcap
        self.softmax_offset = self._sinks(config.num_attention_heads // self.tp_group.size())

    def _sinks(self, num_heads: int) -> torch.nn.Parameter | None:
        assert self.config.softmax_type in ("vanilla", "learnable"), self.config.softmax_type
        if self.config.softmax_type == "vanilla":
            return None
        device = torch.cuda.current_device()
        sinks = torch.nn.Parameter(torch.empty(num_heads, dtype=self.config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(sinks, is_parallel=True, dim=0, stride=1)
        if self.config.perform_initialization:
            with tensor_parallel.get_cuda_rng_tracker().fork():  # each rank has heads of its own
                self.config.init_method(sinks)
        return sinks

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return [sequence, batch, heads * v_channels] for tensors of [sequence, batch, heads, channels].

        Packed sequences are [tokens, heads, channels], and their result has a batch of one. As in Transformer
        Engine's causal attention, `attention_mask` is not looked at.
        """
        assert attn_mask_type is None or attn_mask_type in CAUSAL, attn_mask_type
        assert attention_bias is None, "there is no bias in causal attention"
        if packed_seq_params is not None:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        length = query.size(0)
        key, value = self._gather(key, value)
        hidden = self._hidden(length, packed_seq_params, query.device)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        with self._dropout_generator():
            if self.softcap is None and self.softmax_offset is None:
                context = self._fused(query, key, value, hidden)
            else:
                context = self._attend(query, key, value, hidden)
        return context.permute(2, 0, 1, 3).reshape(length, context.size(0), -1)

    def _gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the whole sequence, rank after rank."""
        if self.cp_group.size() == 1:
            return key, value
        # One message for both; its backward pass sums the gradients of all ranks' queries.
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.cp_group)
        return both.split([key.size(-1), value.size(-1)], dim=-1)

    def _hidden(self, length: int, packed: PackedSeqParams | None, device: torch.device) -> Tensor | None:
        """Return which keys each query may not see; None stands for all later ones."""
        ranks = self.cp_group.size()
        plain_window = self.window is None or self.window[0] < 0 or length <= self.window[0] + 1
        if ranks == 1 and packed is None and plain_window:
            return None
        by_rank = [positions_of_rank(length, rank, ranks, device) for rank in range(ranks)]
        positions = by_rank[self.cp_group.rank()]
        hidden = hidden_keys(positions, torch.cat(by_rank), self.window)
        if packed is None:
            return hidden
        if ranks > 1:
            raise ConfigError(
                "packed sequences with context parallelism need Transformer Engine: set"
                " context_parallel_size to 1"
            )
        sequence = torch.bucketize(positions, packed.cu_seqlens_q[1:].long(), right=True)
        return hidden | (sequence[:, None] != sequence[None, :])

    def _dropout_generator(self) -> Any:
        """Heads of different ranks drop different entries; in sequence parallelism the whole layer does."""
        if not self._active_dropout or self.config.sequence_parallel:
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()

    @property
    def _active_dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if hidden is None else ~hidden,
            is_causal=hidden is None,
            dropout_p=self._active_dropout,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        """Compute attention step by step, the softmax in float32."""
        repeats = query.size(1) // key.size(1)
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        logits = (query @ key.transpose(-1, -2)).float() * self.softmax_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if hidden is None:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(hidden, -math.inf)
        if self.softmax_offset is None:
            weights = torch.softmax(logits, dim=-1)
        else:
            sinks = self.softmax_offset.float()[None, :, None, None].expand(*logits.shape[:-1], 1)
            weights = torch.softmax(torch.cat([logits, sinks], dim=-1), dim=-1)[..., :-1]
        return functional.dropout(weights, self._active_dropout).to(value.dtype) @ value

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Say which heads' sinks this rank holds, under Transformer Engine's name."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
