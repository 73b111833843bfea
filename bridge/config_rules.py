"""Config rules: what each key of a Hugging Face config means to Megatron, both ways.

A rule reads its keys into provider fields, and writes them back. Absent keys have the default that
`transformers` gives them (tests/bridge/test_families.py holds them against it).
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping as Map
from dataclasses import dataclass
from typing import Any, NamedTuple

from bridge.errors import UnsupportedModelError
from bridge.provider import DTYPES, GPTModelProvider
from bridge.value_types import Count, Layers, by_name, first_misfit, shown

REQUIRED = object()
Config = Map[str, Any]
FIELD_TYPES: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(GPTModelProvider)}


class ConfigRule(ABC):
    """Keys of a Hugging Face config and the provider fields that they set."""

    keys: tuple[str, ...]
    travels: bool = True
    """Whether an export keeps the source's own spelling of these keys."""
    value_types: Map[str, Any] = by_name()
    """What values must be for `read` to compute with them, by key, which may be another rule's."""

    @abstractmethod
    def read(self, config: Config) -> dict[str, Any]:
        """Return the provider fields that these keys mean; refuse a value by UnsupportedModelError."""

    @abstractmethod
    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        """Return the keys that mean the provider's fields, in transformers' present spelling."""


def check_types(config: Config, types: Map[str, Any], within: str = "") -> None:
    """Refuse the first value that is not of the type that its key needs; `within` is the object it is in."""
    if name := first_misfit(config, types):
        raise UnsupportedModelError(
            f"config.json has {within}{name} {json.dumps(config[name])}: expected {shown(types[name])}"
        )


def value_of(config: Config, key: str, default: Any) -> Any:
    if key not in config and default is REQUIRED:
        raise UnsupportedModelError(f"config.json has no {key!r}, which this family needs")
    return config.get(key, default)


@dataclass(frozen=True)
class Field(ConfigRule):
    """One key that is one field; `default` may name another key, as in "=num_attention_heads".

    `aliases` are other spellings that transformers reads as this key.
    """

    key: str
    field: str
    default: Any = REQUIRED
    aliases: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.key, *self.aliases)

    @property
    def value_types(self) -> Map[str, Any]:  # type: ignore[override]
        # what rules count with before the model as a whole is checked
        kind = Layers if self.field == "num_layers" else FIELD_TYPES[self.field]
        return dict.fromkeys(self.keys, kind | None if self.default_key else kind)

    @property
    def default_key(self) -> str:
        """The key whose value this one has by default; empty for a value."""
        named = isinstance(self.default, str) and self.default.startswith("=")
        return self.default[1:] if named else ""

    def read(self, config: Config) -> dict[str, Any]:
        given = [key for key in self.keys if key in config]
        if any(config[key] != config[given[0]] for key in given):
            raise UnsupportedModelError(
                f"config.json has {given[0]} {config[given[0]]!r} but {given[1]} {config[given[1]]!r}:"
                " the two mean the same"
            )
        value = value_of(config, given[0] if given else self.key, self.default)
        if self.default_key and value in (None, self.default):
            value = value_of(config, self.default_key, REQUIRED)
        if value is None:
            raise UnsupportedModelError(f"config.json has {self.key} null: a value is needed")
        return {self.field: value}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {self.key: getattr(provider, self.field)}


@dataclass(frozen=True)
class Requires(ConfigRule):
    """A key for which the mapping is right only at some values; the first is the default."""

    key: str
    allowed: tuple[Any, ...]

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get(self.key, self.allowed[0])
        if value not in self.allowed:
            allowed = ", ".join(repr(a) for a in self.allowed)
            raise UnsupportedModelError(
                f"config.json has {self.key} {value!r}: this family supports {allowed}"
            )
        return {}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {self.key: self.allowed[0]}


@dataclass(frozen=True)
class Carried(ConfigRule):
    """Keys without influence on weights or logits; they travel as they are."""

    keys: tuple[str, ...]

    def read(self, config: Config) -> dict[str, Any]:
        return {}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {}


OWN_CODE = (
    "it is never run: if the model computes what transformers' own code for its model_type does, take"
    " auto_map out of config.json"
)


@dataclass(frozen=True)
class OwnCode(ConfigRule):
    """`auto_map`: the code that a model was released with before transformers had it; never run nor exported.

    `classes` are those of the released checkpoints: other code may compute something else.
    """

    classes: tuple[str, ...]
    keys = ("auto_map",)
    travels = False
    value_types = by_name(auto_map=dict[str, str | list[str | None]] | None)

    def read(self, config: Config) -> dict[str, Any]:
        named = dict(config.get("auto_map") or {})
        named.pop("AutoTokenizer", None)
        if unknown := [name for name in named.values() if name not in self.classes]:
            raise UnsupportedModelError(
                f"config.json has auto_map with code of its own, {unknown[0]!r}: this family knows"
                f" {', '.join(self.classes)}; {OWN_CODE}"
            )
        return {}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Constant(ConfigRule):
    """A field that this family always has and that no key says."""

    field: str
    value: Any
    keys = ()

    def read(self, config: Config) -> dict[str, Any]:
        return {self.field: self.value}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        if (found := getattr(provider, self.field)) != self.value:
            raise UnsupportedModelError(
                f"model.{self.field} is {found!r}: a {provider.hf_model_type!r} model has {self.value!r}"
            )
        return {}


@dataclass(frozen=True)
class HeadDim(ConfigRule):
    """`head_dim`: absent or null means hidden size over heads, unless the family has a number of its own."""

    default: int | None = None
    keys = ("head_dim",)
    value_types = by_name(head_dim=Count | None, hidden_size=Count, num_attention_heads=Count)

    def read(self, config: Config) -> dict[str, Any]:
        given = config.get("head_dim", self.default)
        return {"kv_channels": given or config["hidden_size"] // config["num_attention_heads"]}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        absent = self.default or provider.hidden_size // provider.num_attention_heads
        return {} if provider.kv_channels == absent else {"head_dim": provider.kv_channels}


@dataclass(frozen=True)
class Dtype(ConfigRule):
    """The dtype of the weights: `dtype`, or `torch_dtype` before transformers 5."""

    default: str = "float32"
    keys = ("dtype", "torch_dtype")
    value_types = by_name(dtype=str | None, torch_dtype=str | None)

    def read(self, config: Config) -> dict[str, Any]:
        name = config.get("dtype") or config.get("torch_dtype") or self.default
        if name not in DTYPES:
            raise UnsupportedModelError(f"config.json has dtype {name!r}: allowed are {', '.join(DTYPES)}")
        return {"params_dtype": name}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        key = "torch_dtype" if "torch_dtype" in provider.hf_config else "dtype"
        return {key: provider.params_dtype}


@dataclass(frozen=True)
class SlidingWindow(ConfigRule):
    """`sliding_window` of W tokens, the present one included, is Megatron's (W - 1, 0) around a token."""

    default: int | None = None
    keys = ("sliding_window",)
    value_types = by_name(sliding_window=Count | None)

    def read(self, config: Config) -> dict[str, Any]:
        window = config.get("sliding_window", self.default)
        return {"window_size": None if window is None else (window - 1, 0)}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {"sliding_window": provider.window_size[0] + 1 if provider.window_size else None}


@dataclass(frozen=True)
class EveryLayer(ConfigRule):
    """A list with one entry a layer, all of which must be `value`."""

    key: str
    value: str

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        listed = config.get(self.key)
        if listed is not None and listed != [self.value] * config["num_hidden_layers"]:
            raise UnsupportedModelError(
                f"config.json has {self.key} {listed!r}: this family supports {self.value!r} in each of the"
                f" {config['num_hidden_layers']} layers"
            )
        return {}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {self.key: [self.value] * provider.num_layers}


class RopeKeys(NamedTuple):
    """The parameters of one rope type beside rope_type and rope_theta."""

    needed: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


ROPE, FORMER_ROPE = "rope_parameters", "rope_scaling"
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"

# DeepSeek-R1-0528-Qwen3-8B has it.
ATTN_FACTOR = (
    "vLLM multiplies YaRN's 0.1 log(factor) + 1 by it, transformers does not read it; write the product as"
    " attention_factor in its place"
)

ROPE_KEYS = {
    "default": RopeKeys(),
    "linear": RopeKeys(frozenset({"factor"})),
    "dynamic": RopeKeys(frozenset({"factor"})),
    "llama3": RopeKeys(frozenset({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL})),
    "yarn": RopeKeys(
        frozenset({"factor", ORIGINAL}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "longrope": RopeKeys(
        frozenset({"short_factor", "long_factor", ORIGINAL}), frozenset({"factor", "attention_factor"})
    ),
}


ROPE_TYPES: dict[str, Any] = {
    "rope_type": str | None,
    "type": str | None,
    "rope_theta": float | None,
    PARTIAL: float | None,
    ORIGINAL: Count | None,
    "max_position_embeddings": Count | None,
    "short_factor": list[float] | None,
    "long_factor": list[float] | None,
    "truncate": bool | None,
}
"""What the values of rope parameters must be; all others are numbers."""


def _positive(key: str, given: float | None, config: Config, default: float) -> float:
    """Return a rope parameter, which early configs have beside the others, or refuse what turns nothing."""
    value = next(v for v in (given, config.get(key), default) if v is not None)
    if value <= 0:
        raise UnsupportedModelError(f"config.json has {key} {value}: give a number above 0")
    return float(value)


@dataclass(frozen=True)
class Rope(ConfigRule):
    """Rotary embedding: `rope_parameters`, or `rope_theta` and `rope_scaling` before transformers 5.

    `partial` is the share of a head's channels that turn where the config does not say it, in families that
    have `partial_rotary_factor`; `extra` are keys of a family's own that belong to its rope_parameters.
    """

    theta: float = 10000.0
    types: tuple[str, ...] = tuple(ROPE_KEYS)
    partial: float | None = None
    extra: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (ROPE, "rope_theta", FORMER_ROPE, *(() if self.partial is None else (PARTIAL,)))

    @property
    def value_types(self) -> Map[str, Any]:  # type: ignore[override]
        objects, numbers = (ROPE, FORMER_ROPE), ("rope_theta", PARTIAL)
        return {**dict.fromkeys(objects, dict | None), **dict.fromkeys(numbers, float | None)}

    def read(self, config: Config) -> dict[str, Any]:
        if config.get(FORMER_ROPE) and config.get(ROPE):
            self._check_spellings(config)
        return self._meaning(config)

    def _check_spellings(self, config: Config) -> None:
        """transformers takes the former spelling where a config has both, other programs the present one."""
        former, present = (self._meaning({**config, key: None}) for key in (ROPE, FORMER_ROPE))
        if former != present:
            raise UnsupportedModelError(
                f"config.json has {FORMER_ROPE} {config[FORMER_ROPE]!r} but {ROPE} {config[ROPE]!r}: they"
                " are two spellings of one setting, so leave out the one that is not the model's"
            )

    def _meaning(self, config: Config) -> dict[str, Any]:
        given = {k: v for k, v in self.given(config).items() if v is not None}
        check_types(given, {key: ROPE_TYPES.get(key, float) for key in given}, f"{ROPE}.")
        kind = given.pop("rope_type", None) or given.get("type", "default")
        given.pop("type", None)  # some checkpoints spell it both ways
        theta = _positive("rope_theta", given.pop("rope_theta", None), config, self.theta)
        fields = {}
        if self.partial is not None:
            fields["rotary_percent"] = _positive(PARTIAL, given.pop(PARTIAL, None), config, self.partial)
        if kind not in self.types:
            raise UnsupportedModelError(
                f"config.json has rope type {kind!r}: this family supports {', '.join(self.types)}"
            )
        if ORIGINAL in ROPE_KEYS[kind].needed:
            given.setdefault(ORIGINAL, config["max_position_embeddings"])
        self._check_keys(kind, set(given))
        return {
            **fields,
            "rotary_base": theta,
            "rope_parameters": {"rope_type": kind, "rope_theta": theta, **given},
        }

    def given(self, config: Config) -> Config:
        """Return the rope parameters as the config has them, in the order in which transformers looks."""
        given = config.get(FORMER_ROPE) or config.get(ROPE)
        return self.unsaid(config) if given is None else given

    def unsaid(self, config: Config) -> Config:
        """Return those that transformers takes for a config without any."""
        return {}

    def _check_keys(self, kind: str, given: set[str]) -> None:
        needed, optional = ROPE_KEYS[kind]
        if wrong := sorted((needed - given) | (given - needed - optional - set(self.extra))):
            state = "unknown" if wrong[0] in given else "missing"
            taken = f"it takes {', '.join(sorted(needed | optional)) or 'none'}"
            raise UnsupportedModelError(
                f"config.json has rope type {kind!r} with {state} key {wrong[0]!r}:"
                f" {ATTN_FACTOR if wrong[0] == 'attn_factor' else taken}"
            )

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        partial = {} if self.partial is None else {PARTIAL: provider.rotary_percent}
        return {
            "rope_parameters": {**provider.rope_parameters, "rope_theta": provider.rotary_base, **partial}
        }
