"""Floating-point operations of a model's matrix products: one formula for each kind of module.

Counted are 2 for each multiply-add, forward once and backward twice, whatever is recomputed; embeddings,
norms and other work on single elements are left out, as papers on model FLOP/s do.
"""

from dataclasses import dataclass

from bridge.provider import GPTModelProvider


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass for one token, by kind of module, averaged over the sequence."""

    projections: float
    attention: float
    mlp: float
    output: float
    mtp: float

    @property
    def training(self) -> float:
        """Operations of forward and backward passes for one token."""
        return 3 * (self.projections + self.attention + self.mlp + self.output + self.mtp)


def flops_per_token(provider: GPTModelProvider, *, causal: bool = True) -> Flops:
    """Count for sequences of `provider.seq_length`; without `causal` also masked scores."""
    model = provider
    layers = range(model.num_layers)
    moe = sum(model.moe_layers)
    output = 2 * model.hidden_size * model.vocab_size
    depth = model.mtp_num_layers or 0
    last = _projections(model) + _scores(model, model.num_layers - 1, causal) + _last_mlp(model)
    return Flops(
        projections=model.num_layers * _projections(model),
        attention=sum(_scores(model, layer, causal) for layer in layers),
        mlp=moe * _experts(model) + (model.num_layers - moe) * _dense_mlp(model),
        output=output,
        # each depth joins two vectors into one, has a layer like the last and shares the output
        mtp=depth * (2 * 2 * model.hidden_size**2 + last + output),
    )


def _projections(model: GPTModelProvider) -> float:
    """Count the linear layers of attention."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if not model.multi_latent_attention:
        size = model.kv_channels
        return 2 * hidden * (2 * heads + 2 * model.num_query_groups) * size
    query = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    rank = model.q_lora_rank
    queries = hidden * rank + rank * query if rank else hidden * query
    keys = hidden * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
    keys += model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim)
    return 2 * (queries + keys + heads * model.v_head_dim * hidden)


def _scores(model: GPTModelProvider, layer: int, causal: bool) -> float:
    """Count queries times keys and weights times values."""
    if model.multi_latent_attention:
        sizes = model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim
    else:
        sizes = 2 * model.kv_channels
    keys = mean_keys(model, layer) if causal else model.seq_length
    return 2 * keys * model.num_attention_heads * sizes


def mean_keys(model: GPTModelProvider, layer: int) -> float:
    """Return how many keys a query sees on average: half the sequence, or less through a sliding window."""
    length = model.seq_length
    if model.window_size is None or not _has_window(model, layer):
        return length / 2
    window = min(length, model.window_size[0] + 1)
    return window - window**2 / (2 * length)


def _has_window(model: GPTModelProvider, layer: int) -> bool:
    """As is_layer_window_attention in megatron/core/transformer/utils.py."""
    skip = model.window_attn_skip_freq
    if skip is None:
        return True
    return bool(skip[layer]) if isinstance(skip, list) else (layer + 1) % skip != 0


def _dense_mlp(model: GPTModelProvider) -> float:
    return _gated(model, model.ffn_hidden_size)


def _experts(model: GPTModelProvider) -> float:
    """Count the router, the experts that one token goes through, and the shared one."""
    router = 2 * model.hidden_size * (model.num_moe_experts or 0)
    shared = model.moe_shared_expert_intermediate_size or 0
    gate = 2 * model.hidden_size if model.moe_shared_expert_gate else 0
    routed = model.moe_router_topk * _gated(model, model.moe_ffn_hidden_size or model.ffn_hidden_size)
    return router + routed + _gated(model, shared) + gate


def _last_mlp(model: GPTModelProvider) -> float:
    return _experts(model) if model.moe_layers[-1] else _dense_mlp(model)


def _gated(model: GPTModelProvider, width: int) -> float:
    return 2 * model.hidden_size * width * (3 if model.gated_linear_unit else 2)
