"""What two ends say of their model, setting by setting."""

from pathlib import Path
from typing import Any, NamedTuple

from bridge.ends import NOTHING, GivenModel, describe, is_described
from bridge.megatron_arguments import contradictions, read_arguments
from bridge.megatron_checkpoint import resolve_checkpoint


class ConfigDifference(NamedTuple):
    """A setting under Megatron's name, and what each end says."""

    name: str
    a: Any
    b: Any


def compare_configs(a: Path, b: Path, given: GivenModel = NOTHING) -> list[ConfigDifference]:
    """List what two ends say differently of their model, down to the keys of nested settings.

    Where one end describes the other, of plain Megatron-LM, these are the contradictions to its arguments.
    """
    if given.config_from == b and not is_described(a):
        return [ConfigDifference(*each) for each in differing_arguments(a, b)]
    if given.config_from == a and not is_described(b):
        return [ConfigDifference(name, own, other) for name, other, own in differing_arguments(b, a)]
    first, second = (flat({**describe(end, given).to_dict(), "hf_config": None}) for end in (a, b))
    names = sorted(first | second)
    return [
        ConfigDifference(name, first.get(name), second.get(name))
        for name in names
        if first.get(name) != second.get(name)
    ]


def differing_arguments(plain: Path, described: Path) -> list[tuple[str, Any, Any]]:
    """List what the arguments of a checkpoint and another end's model say differently, in this order."""
    arguments = read_arguments(resolve_checkpoint(plain)) or {}
    found = contradictions(describe(described), arguments)
    return [(each.name, each.trained, each.described) for each in found]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
