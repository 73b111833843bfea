"""Plain values, as JSON has them, held against type annotations."""

import types
import typing
from collections.abc import Mapping
from typing import Any, NewType, Union

UNIONS = (Union, types.UnionType)
Count = NewType("Count", int)
"""A whole number of 1 or more."""
Layers = NewType("Layers", int)
"""A number of layers: 1 to MAX_LAYERS."""
MAX_LAYERS = 10_000  # a list with an entry for each is small


def fits(value: Any, kind: Any) -> bool:
    """Say whether a value is one of an annotated type: an int is a float, a list may be a tuple."""
    origin, items = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in UNIONS:
        return any(fits(value, item) for item in items)
    if origin in (Any, object):
        return True
    if origin is Count:
        return fits(value, int) and value >= 1
    if origin is Layers:
        return fits(value, Count) and value <= MAX_LAYERS
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(items) and all(map(fits, value, items))
    # A bool is an int to Python only.
    expected: Any = (int, float) if origin is float else origin
    if not isinstance(value, expected) or isinstance(value, bool) != (origin is bool):
        return False
    members: Any = value.values() if origin is dict else value
    return not items or all(fits(member, items[-1]) for member in members)


def by_name(**kinds: Any) -> Mapping[str, Any]:
    """Return types by the names of what is to have them."""
    return types.MappingProxyType(kinds)


def shown(kind: Any) -> str:
    """Return a type for people."""
    origin, items = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in UNIONS:
        return " or ".join(map(shown, items))
    if origin is type(None):
        return "null"
    if origin is Count:
        return "an int of 1 or more"
    if origin is Layers:
        return f"an int of 1 to {MAX_LAYERS}"
    if origin is tuple:
        return f"[{', '.join(map(shown, items))}]"
    if origin is dict:
        return "an object"
    return f"list[{shown(items[0])}]" if items else origin.__name__


def first_misfit(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> str | None:
    """Return the first name whose value is not of its type; None if there is none."""
    return next(
        (name for name, kind in kinds.items() if name in values and not fits(values[name], kind)), None
    )
