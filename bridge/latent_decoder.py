"""Rules that families with latent attention share (DeepSeek-V2 and its successors)."""

from collections.abc import Mapping as Map
from dataclasses import dataclass
from typing import Any

from bridge.config_rules import Carried, Config, ConfigRule, Constant, Dtype, Field, Requires
from bridge.decoder import HF_ATTENTION, MEGATRON_ATTENTION
from bridge.errors import UnsupportedModelError
from bridge.mapping import DirectMapping, Mapping
from bridge.provider import GPTModelProvider
from bridge.run_keys import WITHOUT_MEANING
from bridge.value_types import Count, by_name


@dataclass(frozen=True)
class Derived(ConfigRule):
    """A key that, if given, is the sum of others; `parts` are those, with the provider's fields for them."""

    key: str
    parts: Map[str, str]

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        given, parts = config.get(self.key), [config[part] for part in self.parts if part in config]
        if given is not None and len(parts) == len(self.parts) and given != sum(parts):
            raise UnsupportedModelError(
                f"config.json has {self.key} {given!r}: in this family it is {' + '.join(self.parts)},"
                f" which is {sum(parts)}"
            )
        return {}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {self.key: sum(getattr(provider, field) for field in self.parts.values())}


@dataclass(frozen=True)
class OriginalRequires(Requires):
    """A key of DeepSeek's own config that transformers does not have."""

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class QueryRank(ConfigRule):
    """`q_lora_rank`: null where queries come from the hidden state without a latent (V2-Lite, Moonlight)."""

    default: int | None = 1536
    keys = ("q_lora_rank",)
    value_types = by_name(q_lora_rank=Count | None)

    def read(self, config: Config) -> dict[str, Any]:
        return {"q_lora_rank": config.get("q_lora_rank", self.default)}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {"q_lora_rank": provider.q_lora_rank}


LATENT_ROPES = ("default", "linear", "llama3", "yarn")
"""Rope types that do not depend on the length of a sequence, as Megatron's latent attention needs it."""

LATENT_CONFIG: tuple[ConfigRule, ...] = (
    Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "ffn_hidden_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("vocab_size", "vocab_size"),
    Field("max_position_embeddings", "max_position_embeddings"),
    Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
    Field("initializer_range", "init_method_std", default=0.02),
    Field("attention_dropout", "attention_dropout", default=0.0),
    Field("tie_word_embeddings", "share_embeddings_and_output_weights", default=False),
    QueryRank(),
    Field("kv_lora_rank", "kv_lora_rank", default=512),
    Field("qk_nope_head_dim", "qk_head_dim", default=128),
    Field("qk_rope_head_dim", "qk_pos_emb_head_dim", default=64),
    Field("v_head_dim", "v_head_dim", default=128),
    Derived("num_key_value_heads", {"num_attention_heads": "num_attention_heads"}),
    Derived("qk_head_dim", {"qk_nope_head_dim": "qk_head_dim", "qk_rope_head_dim": "qk_pos_emb_head_dim"}),
    Derived("head_dim", {"qk_rope_head_dim": "qk_pos_emb_head_dim"}),
    Constant("multi_latent_attention", True),
    Constant("qk_layernorm", True),
    # as the modelling code has it, which does not pass rms_norm_eps on to these norms
    Constant("latent_layernorm_epsilon", 1e-6),
    Requires("hidden_act", ("silu",)),
    Requires("attention_bias", (False,)),
    Requires("is_encoder_decoder", (False,)),
    OriginalRequires("moe_layer_freq", (1,)),
    Dtype(),
    WITHOUT_MEANING,
    # how the experts were spread and balanced in training
    Carried(("ep_size", "aux_loss_alpha", "seq_aux", "output_router_logits")),
)


def attention_tensor(megatron: str, hf: str, *shape: str, when: str = "") -> Mapping:
    return DirectMapping(f"{MEGATRON_ATTENTION}.{megatron}", f"{HF_ATTENTION}.{hf}.weight", shape, when=when)


LATENT_ATTENTION: tuple[Mapping, ...] = (
    DirectMapping(
        "decoder.layers.*.input_layernorm.weight", "model.layers.*.input_layernorm.weight", ("hidden_size",)
    ),
    attention_tensor(
        "linear_q_proj.weight", "q_proj", "latent_query_size", "hidden_size", when="not q_lora_rank"
    ),
    attention_tensor(
        "linear_q_down_proj.weight", "q_a_proj", "q_lora_rank", "hidden_size", when="q_lora_rank"
    ),
    attention_tensor(
        "linear_q_up_proj.layer_norm_weight", "q_a_layernorm", "q_lora_rank", when="q_lora_rank"
    ),
    attention_tensor(
        "linear_q_up_proj.weight", "q_b_proj", "latent_query_size", "q_lora_rank", when="q_lora_rank"
    ),
    attention_tensor("linear_kv_down_proj.weight", "kv_a_proj_with_mqa", "latent_size", "hidden_size"),
    attention_tensor("linear_kv_up_proj.layer_norm_weight", "kv_a_layernorm", "kv_lora_rank"),
    attention_tensor("linear_kv_up_proj.weight", "kv_b_proj", "latent_key_value_size", "kv_lora_rank"),
    attention_tensor("linear_proj.weight", "o_proj", "hidden_size", "latent_value_size"),
)


def own_code(model: str) -> tuple[str, ...]:
    """Return the classes that DeepSeek's checkpoints name in `auto_map`, such as those of "DeepseekV3"."""
    modelling = (f"modeling_deepseek.{model}{kind}" for kind in ("Model", "ForCausalLM"))
    return f"configuration_deepseek.{model}Config", *modelling
