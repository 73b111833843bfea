"""Changes of a config by dotted names, from a spec file, the shell or a form."""

import dataclasses
import difflib
import itertools
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from bridge.errors import ConfigError
from bridge.value_types import fits, shown
from training.config import ConfigContainer
from training.precision import mixed_precision

RECIPE = "mixed_precision"
FOLLOWS = {"model.params_dtype": "mixed_precision, such as mixed_precision=fp32"}
ALIKE = 0.65  # of two fields' letters: "max_steps" is not alike "max_skipped", "seqlen" is "seq_length"
SHORT = 4  # letters
LISTED = 30  # settings of a section that are named where none is alike


def apply_overrides(config: ConfigContainer, overrides: Mapping[str, Any] | Iterable[str]) -> ConfigContainer:
    """Set fields of `config` in place, from `{"train.train_iters": 20}` or `["train.train_iters=20"]`.

    The values of strings are read as JSON, and as plain text where the field is one. `mixed_precision` alone
    takes the name of a recipe, which fills the whole section.
    """
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_split, overrides)
    for name, value in pairs:
        if name == RECIPE:
            config.mixed_precision = mixed_precision(str(value))
            continue
        section, field = _field(config, name)
        setattr(section, field, _checked(name, value, typing.get_type_hints(type(section))[field]))
    return config


def override_names(config: ConfigContainer) -> list[str]:
    """List every name that an override may set."""
    sections = [f.name for f in dataclasses.fields(config)]
    return [RECIPE] + [
        f"{name}.{f.name}" for name in sections for f in dataclasses.fields(getattr(config, name))
    ]


@dataclasses.dataclass(frozen=True)
class _Written:
    """A value as it was typed."""

    text: str

    def __str__(self) -> str:
        return self.text

    def readings(self) -> list[Any]:
        try:
            return [json.loads(self.text), self.text]
        except ValueError:
            return [self.text]


def _split(assignment: str) -> tuple[str, _Written]:
    name, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"override {assignment!r} has no '=': write section.field=value")
    return name.strip(), _Written(text)


def _field(config: ConfigContainer, name: str) -> tuple[Any, str]:
    section, _, field = name.partition(".")
    if name in FOLLOWS:
        raise ConfigError(f"{name} follows from another setting: give {FOLLOWS[name]}")
    if name not in (names := override_names(config)):
        raise ConfigError(f"no setting is called {name!r}: {_hint(names, name)}")
    return getattr(config, section), field


def _hint(names: list[str], name: str) -> str:
    """Say which setting was meant, at best one of the section that was given, or what there is."""
    section = name.partition(".")[0]
    own = [known for known in names if known.startswith(f"{section}.")]
    for some in filter(None, (own, names)):
        nearest = max(some, key=lambda known: _likeness(known, name))
        if _is_alike(nearest, name):
            return f"did you mean {nearest!r}?"
    if 0 < len(own) <= LISTED:
        return f"{section} has {', '.join(known.partition('.')[2] for known in own)}"
    sections = dict.fromkeys(known.partition(".")[0] for known in names if "." in known)
    return f"give section.field, of the sections {', '.join(sections)}"


def _is_alike(known: str, name: str) -> bool:
    """Compare the fields, and short ones such as lr together with their section."""
    is_short = len(known.rpartition(".")[2]) < SHORT
    return max(_likeness(known, name)[0], _ratio(known, name) * is_short) >= ALIKE


def _likeness(known: str, name: str) -> tuple[float, float]:
    """Compare the fields first: people mistake or forget a section more easily."""
    (section, _, field), (given_section, _, given_field) = known.rpartition("."), name.rpartition(".")
    return _ratio(field, given_field), _ratio(section, given_section)


def _ratio(known: str, given: str) -> float:
    return difflib.SequenceMatcher(None, known, given).ratio()


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type that `hint` names (an int is a float, a list is a tuple), or raise."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    readings = value.readings() if isinstance(value, _Written) else [value]
    for reading, option in itertools.product(readings, options):
        if fits(reading, option):
            return _converted(reading, option)
    raise ConfigError(f"{name} is {json.dumps(readings[0], default=str)}: expected {shown(hint)}")


def _converted(value: Any, option: Any) -> Any:
    origin, items = typing.get_origin(option) or option, typing.get_args(option)
    if origin is float:
        return float(value)
    if origin is list:
        return [_converted(item, items[0]) for item in value]
    return tuple(value) if origin is tuple else value
