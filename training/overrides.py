"""Changes of a config by dotted names, from a spec file, the shell or a form."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from bridge.errors import ConfigError
from training.config import ConfigContainer


def apply_overrides(config: ConfigContainer, overrides: Mapping[str, Any] | Iterable[str]) -> ConfigContainer:
    """Set fields of `config` in place, from `{"train.train_iters": 20}` or `["train.train_iters=20"]`.

    The values of strings are read as JSON, and as plain text where the field is one.
    """
    named = overrides if isinstance(overrides, Mapping) else dict(map(_split, overrides))
    for name, value in named.items():
        section, field = _field(config, name)
        setattr(section, field.name, _checked(name, value, typing.get_type_hints(type(section))[field.name]))
    return config


def override_names(config: ConfigContainer) -> list[str]:
    """List every dotted name that an override may set."""
    sections = [f.name for f in dataclasses.fields(config)]
    return [f"{name}.{f.name}" for name in sections for f in dataclasses.fields(getattr(config, name))]


def _split(assignment: str) -> tuple[str, Any]:
    name, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"override {assignment!r} has no '=': write section.field=value")
    try:
        return name.strip(), json.loads(text)
    except ValueError:
        return name.strip(), text


def _field(config: ConfigContainer, name: str) -> tuple[Any, dataclasses.Field]:
    section_name, _, field_name = name.partition(".")
    names = override_names(config)
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ConfigError(f"no setting is called {name!r}: did you mean {nearest!r}?")
    section = getattr(config, section_name)
    return section, next(f for f in dataclasses.fields(section) if f.name == field_name)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type that `hint` names (an int is a float, a list is a tuple), or raise."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if _fits(value, option):
            return _converted(value, option)
    shown = " or ".join("null" if option is type(None) else _shown(option) for option in options)
    raise ConfigError(f"{name} is {json.dumps(value, default=str)}: expected {shown}")


def _fits(value: Any, option: Any) -> bool:
    origin, items = typing.get_origin(option) or option, typing.get_args(option)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, items[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(items) and all(map(_fits, value, items))
    return isinstance(value, origin)


def _converted(value: Any, option: Any) -> Any:
    origin, items = typing.get_origin(option) or option, typing.get_args(option)
    if origin is float:
        return float(value)
    if origin is list:
        return [_converted(item, items[0]) for item in value]
    return tuple(value) if origin is tuple else value


def _shown(option: Any) -> str:
    return str(option) if typing.get_args(option) else option.__name__
