"""Rules that decoder-only families of Llama's shape share."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from bridge.config_rules import ConfigRule, Dtype, Field, Requires
from bridge.mapping import (
    DirectMapping,
    FusedQKVMapping,
    GatedMLPMapping,
    Mapping,
    MegatronMappingRegistry,
    OutputMapping,
    QKVMapping,
)
from bridge.run_keys import WITHOUT_MEANING

DECODER_CONFIG: tuple[ConfigRule, ...] = (
    Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "ffn_hidden_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_key_value_heads", "num_query_groups", default="=num_attention_heads"),
    Field("vocab_size", "vocab_size"),
    Field("max_position_embeddings", "max_position_embeddings"),
    Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
    Field("initializer_range", "init_method_std", default=0.02),
    Field("attention_dropout", "attention_dropout", default=0.0),
    Field("tie_word_embeddings", "share_embeddings_and_output_weights", default=False),
    Requires("hidden_act", ("silu",)),
    Requires("is_encoder_decoder", (False,)),
    Dtype(),
    WITHOUT_MEANING,
)


def with_defaults(rules: Iterable[ConfigRule], **defaults: Any) -> tuple[ConfigRule, ...]:
    """Return the rules with a family's own defaults for some of their keys."""
    return tuple(
        dataclasses.replace(rule, default=defaults[rule.key])
        if isinstance(rule, Field) and rule.key in defaults
        else rule
        for rule in rules
    )


def without(rules: Iterable[ConfigRule], *keys: str) -> tuple[ConfigRule, ...]:
    """Return the rules but those of the named keys, which a family spells or means otherwise."""
    return tuple(rule for rule in rules if not set(rule.keys) & set(keys))


MEGATRON_ATTENTION = "decoder.layers.*.self_attention"
HF_ATTENTION = "model.layers.*.self_attn"

EMBEDDING = DirectMapping(
    "embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab_size", "hidden_size")
)

ATTENTION_NORM = DirectMapping(
    f"{MEGATRON_ATTENTION}.linear_qkv.layer_norm_weight",
    "model.layers.*.input_layernorm.weight",
    ("hidden_size",),
)
QKV = QKVMapping(
    f"{MEGATRON_ATTENTION}.linear_qkv.weight",
    q=f"{HF_ATTENTION}.q_proj.weight",
    k=f"{HF_ATTENTION}.k_proj.weight",
    v=f"{HF_ATTENTION}.v_proj.weight",
)
OUTPUT_PROJECTION = DirectMapping(
    f"{MEGATRON_ATTENTION}.linear_proj.weight",
    f"{HF_ATTENTION}.o_proj.weight",
    ("hidden_size", "query_size"),
)
ATTENTION = (ATTENTION_NORM, QKV, OUTPUT_PROJECTION)


def mlp_norm(hf_param: str, layers: str = "all") -> DirectMapping:
    """Return the rule of the norm in front of the MLP."""
    return DirectMapping(
        "decoder.layers.*.mlp.linear_fc1.layer_norm_weight", hf_param, ("hidden_size",), layers=layers
    )


def mlp_products(layers: str = "all") -> tuple[Mapping, ...]:
    """Return the rules of a gated MLP's two products."""
    return (
        GatedMLPMapping(
            "decoder.layers.*.mlp.linear_fc1.weight",
            gate="model.layers.*.mlp.gate_proj.weight",
            up="model.layers.*.mlp.up_proj.weight",
            layers=layers,
        ),
        DirectMapping(
            "decoder.layers.*.mlp.linear_fc2.weight",
            "model.layers.*.mlp.down_proj.weight",
            ("hidden_size", "ffn_hidden_size"),
            layers=layers,
        ),
    )


def gated_mlp(layers: str = "all") -> tuple[Mapping, ...]:
    """Return the rules of the MLP, with the norm in front of it, of all layers or of the "dense" ones."""
    return mlp_norm("model.layers.*.post_attention_layernorm.weight", layers), *mlp_products(layers)


MLP_NORM = mlp_norm("model.layers.*.post_attention_layernorm.weight")
UNGATED_MLP = (
    DirectMapping(
        "decoder.layers.*.mlp.linear_fc1.weight",
        "model.layers.*.mlp.up_proj.weight",
        ("ffn_hidden_size", "hidden_size"),
    ),
    DirectMapping(
        "decoder.layers.*.mlp.linear_fc2.weight",
        "model.layers.*.mlp.down_proj.weight",
        ("hidden_size", "ffn_hidden_size"),
    ),
)
NORM_BIASES = (
    DirectMapping(
        f"{MEGATRON_ATTENTION}.linear_qkv.layer_norm_bias",
        "model.layers.*.input_layernorm.bias",
        ("hidden_size",),
    ),
    DirectMapping(
        "decoder.layers.*.mlp.linear_fc1.layer_norm_bias",
        "model.layers.*.post_attention_layernorm.bias",
        ("hidden_size",),
    ),
    DirectMapping("decoder.final_layernorm.bias", "model.norm.bias", ("hidden_size",)),
)
FUSED_QKV = FusedQKVMapping(f"{MEGATRON_ATTENTION}.linear_qkv.weight", f"{HF_ATTENTION}.qkv_proj.weight")
FUSED_GATED_MLP = (
    DirectMapping(
        "decoder.layers.*.mlp.linear_fc1.weight",
        "model.layers.*.mlp.gate_up_proj.weight",
        ("gate_and_up_size", "hidden_size"),
    ),
    DirectMapping(
        "decoder.layers.*.mlp.linear_fc2.weight",
        "model.layers.*.mlp.down_proj.weight",
        ("hidden_size", "ffn_hidden_size"),
    ),
)
POST_NORMS = (
    DirectMapping(
        f"{MEGATRON_ATTENTION}.linear_proj.post_layernorm.weight",
        "model.layers.*.post_attention_layernorm.weight",
        ("hidden_size",),
    ),
    DirectMapping(
        "decoder.layers.*.mlp.linear_fc2.post_layernorm.weight",
        "model.layers.*.post_feedforward_layernorm.weight",
        ("hidden_size",),
    ),
)

OUTPUT = (
    DirectMapping("decoder.final_layernorm.weight", "model.norm.weight", ("hidden_size",)),
    OutputMapping(
        "output_layer.weight",
        "lm_head.weight",
        ("vocab_size", "hidden_size"),
        tied_to="model.embed_tokens.weight",
    ),
)

BUFFERS = (f"{HF_ATTENTION}.rotary_emb.inv_freq",)


def decoder_weights(*extra: Mapping) -> MegatronMappingRegistry:
    """Return the weight rules of a pre-norm decoder with a gated MLP, and those that a family adds."""
    return MegatronMappingRegistry(EMBEDDING, *ATTENTION, *gated_mlp(), *extra, *OUTPUT, buffers=BUFFERS)


def sandwich_weights(*extra: Mapping) -> MegatronMappingRegistry:
    """Return the weight rules of a decoder with norms in front of attention and MLP and behind them."""
    norm = mlp_norm("model.layers.*.pre_feedforward_layernorm.weight")
    layer = (*ATTENTION, norm, *mlp_products(), *POST_NORMS)
    return MegatronMappingRegistry(EMBEDDING, *layer, *extra, *OUTPUT, buffers=BUFFERS)


def post_norm_weights(*extra: Mapping) -> MegatronMappingRegistry:
    """Return the weight rules of a decoder whose only norms in a layer are behind attention and MLP."""
    layer = (QKV, OUTPUT_PROJECTION, *mlp_products(), *POST_NORMS)
    return MegatronMappingRegistry(EMBEDDING, *layer, *extra, *OUTPUT, buffers=BUFFERS)


QKV_BIAS = QKVMapping(
    f"{MEGATRON_ATTENTION}.linear_qkv.bias",
    q=f"{HF_ATTENTION}.q_proj.bias",
    k=f"{HF_ATTENTION}.k_proj.bias",
    v=f"{HF_ATTENTION}.v_proj.bias",
    columns=(),
)

QK_NORM = (
    DirectMapping(
        f"{MEGATRON_ATTENTION}.q_layernorm.weight", f"{HF_ATTENTION}.q_norm.weight", ("kv_channels",)
    ),
    DirectMapping(
        f"{MEGATRON_ATTENTION}.k_layernorm.weight", f"{HF_ATTENTION}.k_norm.weight", ("kv_channels",)
    ),
)

QK_NORM_OF_ALL = (
    DirectMapping(
        f"{MEGATRON_ATTENTION}.q_layernorm.weight", f"{HF_ATTENTION}.q_norm.weight", ("query_size",)
    ),
    DirectMapping(
        f"{MEGATRON_ATTENTION}.k_layernorm.weight", f"{HF_ATTENTION}.k_norm.weight", ("key_value_size",)
    ),
)
"""The same over all heads of a layer at once, `qk_layernorm_scope` "layer"."""
