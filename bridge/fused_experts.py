"""Rules of gpt-oss: experts in one tensor, stored transposed, with gate and up projections in turn."""

from collections.abc import Iterator
from dataclasses import dataclass

from bridge.config_rules import ORIGINAL, Config, Rope
from bridge.decoder import HF_ATTENTION, MEGATRON_ATTENTION
from bridge.experts import HF_MLP, MEGATRON_MLP
from bridge.mapping import Dimension, DirectMapping, Mapping, Piece, Shape, resolve
from bridge.provider import GPTModelProvider


@dataclass(frozen=True)
class YarnByDefault(Rope):
    """Rope that transformers scales by yarn where the config does not say how."""

    def unsaid(self, config: Config) -> Config:
        return {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            ORIGINAL: 4096,
        }


@dataclass(frozen=True)
class InterleavedGatedMLPMapping(Mapping):
    """Gate and up projections of every expert in one tensor whose rows are one of each in turn."""

    hf_param: str
    columns: tuple[Dimension, ...] = ("hidden_size",)

    def hf_shapes(self, provider: GPTModelProvider) -> dict[str, Shape]:
        columns = tuple(resolve(dimension, provider) for dimension in self.columns)
        return {self.hf_param: (2 * resolve("expert_size", provider), *columns)}

    def pieces(self, provider: GPTModelProvider) -> Iterator[Piece]:
        rows = resolve("expert_size", provider)
        yield Piece(self.hf_param, 0, rows, 0, hf_step=2)
        yield Piece(self.hf_param, 1, rows, rows, hf_step=2)


SINKS = DirectMapping(
    f"{MEGATRON_ATTENTION}.core_attention.softmax_offset", f"{HF_ATTENTION}.sinks", ("num_attention_heads",)
)

ATTENTION_OUTPUT_BIAS = DirectMapping(
    f"{MEGATRON_ATTENTION}.linear_proj.bias", f"{HF_ATTENTION}.o_proj.bias", ("hidden_size",)
)


def fused_expert_weights() -> tuple[Mapping, ...]:
    """Return the rules of router and experts, all with biases, and of the norm in front of them."""
    experts = f"{MEGATRON_MLP}.experts.experts"
    return (
        DirectMapping(
            "decoder.layers.*.pre_mlp_layernorm.weight",
            "model.layers.*.post_attention_layernorm.weight",
            ("hidden_size",),
        ),
        DirectMapping(
            f"{MEGATRON_MLP}.router.weight", f"{HF_MLP}.router.weight", ("num_moe_experts", "hidden_size")
        ),
        DirectMapping(f"{MEGATRON_MLP}.router.bias", f"{HF_MLP}.router.bias", ("num_moe_experts",)),
        InterleavedGatedMLPMapping(
            f"{experts}.linear_fc1.weight",
            f"{HF_MLP}.experts.gate_up_proj",
            experts=True,
            fused=True,
            transposed=True,
        ),
        InterleavedGatedMLPMapping(
            f"{experts}.linear_fc1.bias",
            f"{HF_MLP}.experts.gate_up_proj_bias",
            columns=(),
            experts=True,
            fused=True,
        ),
        DirectMapping(
            f"{experts}.linear_fc2.weight",
            f"{HF_MLP}.experts.down_proj",
            ("hidden_size", "expert_size"),
            experts=True,
            fused=True,
            transposed=True,
        ),
        DirectMapping(
            f"{experts}.linear_fc2.bias",
            f"{HF_MLP}.experts.down_proj_bias",
            ("hidden_size",),
            experts=True,
            fused=True,
        ),
    )
