"""Config rules of decoders whose attention differs by layer, by position or in its scale."""

from dataclasses import dataclass
from typing import Any

from bridge.config_rules import (
    FORMER_ROPE,
    ORIGINAL,
    ROPE,
    Config,
    ConfigRule,
    Field,
    Requires,
    Rope,
    check_types,
)
from bridge.errors import UnsupportedModelError
from bridge.provider import GPTModelProvider
from bridge.value_types import Count, by_name

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Former(Requires):
    """A key of earlier configs that transformers no longer writes; absent from what is written anew."""

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Repeats(ConfigRule):
    """A key that says once more what `rule` reads as `field`; transformers does not read it."""

    key: str
    rule: ConfigRule
    field: str

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = self.rule.read(config)[self.field]
        if (given := config.get(self.key)) not in (None, value):
            raise UnsupportedModelError(
                f"config.json has {self.key} {given!r}: by its other keys this is {value!r}"
            )
        return {self.field: value}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Nullable(Field):
    """One key that is one field and may be null, which is None."""

    def read(self, config: Config) -> dict[str, Any]:
        return {self.field: config.get(self.key, self.default)}


@dataclass(frozen=True)
class QueryScalar(ConfigRule):
    """`query_pre_attn_scalar`: queries are divided by its square root, whatever the head size."""

    default: int = 256
    keys = ("query_pre_attn_scalar",)
    value_types = by_name(query_pre_attn_scalar=Count)

    def read(self, config: Config) -> dict[str, Any]:
        return {"softmax_scale": config.get("query_pre_attn_scalar", self.default) ** -0.5}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        scale = provider.softmax_scale or provider.kv_channels**-0.5
        scalar = round(scale**-2)
        if abs(scalar**-0.5 - scale) > 1e-9:
            raise UnsupportedModelError(
                f"model.softmax_scale is {scale}: query_pre_attn_scalar can only say one over the square root"
                " of a whole number"
            )
        return {"query_pre_attn_scalar": scalar}


@dataclass(frozen=True)
class EmbeddingScale(ConfigRule):
    """The embedding's output is multiplied by the square root of its size, which no key says."""

    keys = ()

    def read(self, config: Config) -> dict[str, Any]:
        return {"embedding_scale": config["hidden_size"] ** 0.5}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        if provider.embedding_scale != provider.hidden_size**0.5:
            raise UnsupportedModelError(
                f"model.embedding_scale is {provider.embedding_scale}: a {provider.hf_model_type!r} model has"
                f" the square root of its hidden size, {provider.hidden_size**0.5}"
            )
        return {}


@dataclass(frozen=True)
class WindowedLayers(ConfigRule):
    """`sliding_window` for the layers that `layer_types` names; without it, for all but every nth.

    `window` and `pattern` are what transformers takes where the config does not say them. Gemma 2 9B and 27B
    have the window a second time, as `sliding_window_size`, which transformers does not read.
    """

    window: int
    pattern: int
    keys = (
        "sliding_window",
        "sliding_window_size",
        "layer_types",
        "sliding_window_pattern",
        "_sliding_window_pattern",
    )
    value_types = by_name(sliding_window=Count, layer_types=list[str] | None, sliding_window_pattern=Count)

    def read(self, config: Config) -> dict[str, Any]:
        window = config.get("sliding_window", self.window)
        types = config.get("layer_types") or self._types(config)
        if unknown := sorted(set(types) - {SLIDING, FULL}):
            raise UnsupportedModelError(
                f"config.json has layer_types with {unknown[0]!r}: this family supports {SLIDING}, {FULL}"
            )
        if len(types) != config["num_hidden_layers"]:
            raise UnsupportedModelError(
                f"config.json has {len(types)} layer_types for {config['num_hidden_layers']} layers"
            )
        if (copy := config.get("sliding_window_size", window)) != window:
            raise UnsupportedModelError(
                f"config.json has sliding_window {window} but sliding_window_size {copy}: they must be equal"
            )
        return {"window_size": (window - 1, 0), "window_attn_skip_freq": [int(t == SLIDING) for t in types]}

    def _types(self, config: Config) -> list[str]:
        pattern = config.get("sliding_window_pattern", self.pattern)
        return [SLIDING if (n + 1) % pattern else FULL for n in range(config["num_hidden_layers"])]

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        if provider.window_size is None or not isinstance(provider.window_attn_skip_freq, list):
            raise UnsupportedModelError(
                f"model.window_size {provider.window_size} with model.window_attn_skip_freq"
                f" {provider.window_attn_skip_freq}: this family needs a window and a list of 0 and 1"
            )
        types = [SLIDING if windowed else FULL for windowed in provider.window_attn_skip_freq]
        return {"sliding_window": provider.window_size[0] + 1, "layer_types": types}


@dataclass(frozen=True)
class TwoRopes(ConfigRule):
    """One rope for layers with a sliding window and one for the others (Gemma 3).

    `rope_parameters` has one entry by layer type. Before transformers 5, `rope_local_base_freq` was the
    former, unscaled; `rope_theta` and `rope_scaling` were the latter.
    """

    theta: float = 1000000.0
    local_theta: float = 10000.0
    # Megatron has one attention factor for all layers, which yarn and longrope would need two of.
    types: tuple[str, ...] = ("default", "linear", "llama3")
    keys = (ROPE, "rope_theta", FORMER_ROPE, "rope_local_base_freq")
    value_types = by_name(
        rope_parameters=dict | None,
        rope_scaling=dict | None,
        rope_theta=float | None,
        rope_local_base_freq=float | None,
    )

    def read(self, config: Config) -> dict[str, Any]:
        given = config.get(ROPE) or {}
        if unknown := sorted(set(given) - {SLIDING, FULL}):
            raise UnsupportedModelError(
                f"config.json has rope_parameters with key {unknown[0]!r}: they are by layer type, {SLIDING}"
                f" and {FULL}"
            )
        check_types(given, dict.fromkeys((SLIDING, FULL), dict | None), f"{ROPE}.")
        scaled = {ROPE: given.get(FULL), FORMER_ROPE: config.get(FORMER_ROPE)}
        sizes = {"max_position_embeddings": config["max_position_embeddings"]}
        main = Rope(config.get("rope_theta") or self.theta, self.types)
        beside = Rope(config.get("rope_local_base_freq") or self.local_theta, self.types)
        return {
            **main.read({**sizes, **scaled}),
            "rope_local_parameters": beside.read({**sizes, ROPE: given.get(SLIDING)})["rope_parameters"],
        }

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        main = {**provider.rope_parameters, "rope_theta": provider.rotary_base}
        return {"rope_parameters": {SLIDING: provider.rope_local_parameters, FULL: main}}


@dataclass(frozen=True)
class PositionScaledRope(Rope):
    """Rope whose parameters also scale queries by position, as in Llama 4 (Ministral 3).

    transformers has a whole set of parameters for a config without any.
    """

    extra: tuple[str, ...] = ("llama_4_scaling_beta", "max_position_embeddings", ORIGINAL)

    def read(self, config: Config) -> dict[str, Any]:
        fields = super().read(config)
        for key in ("llama_4_scaling_beta", ORIGINAL):
            if key not in fields["rope_parameters"]:
                raise UnsupportedModelError(f"config.json has rope_parameters without {key!r}: it is needed")
        return fields

    def unsaid(self, config: Config) -> Config:
        return {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            ORIGINAL: 16384,
            "max_position_embeddings": config["max_position_embeddings"],
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        }


@dataclass(frozen=True)
class OriginalLengthRope(Rope):
    """Rope with the original length beside its parameters, over one among them (Phi-3).

    "su" and "yarn" are what early checkpoints called longrope.
    """

    types: tuple[str, ...] = ("default", "longrope")
    length: int = 4096

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*super().keys, ORIGINAL)

    def given(self, config: Config) -> Config:
        given = dict(super().given(config))
        for key in ("rope_type", "type"):
            given[key] = "longrope" if given.get(key) in ("su", "yarn") else given.get(key)
        kind = given["rope_type"] or given["type"]
        return {**given, ORIGINAL: config.get(ORIGINAL, self.length) if kind == "longrope" else None}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        original = provider.rope_parameters.get(ORIGINAL, self.length)
        return {**super().write(provider), **({} if original == self.length else {ORIGINAL: original})}
