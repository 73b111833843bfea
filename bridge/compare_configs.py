"""What two ends say of their model, setting by setting."""

from pathlib import Path
from typing import Any, NamedTuple

from bridge.families import family_named, provider_of
from bridge.hf_checkpoint import read_config
from bridge.megatron_checkpoint import is_megatron_checkpoint, read_model, resolve_checkpoint
from bridge.provider import GPTModelProvider


class ConfigDifference(NamedTuple):
    """A setting under Megatron's name, and what each end says."""

    name: str
    a: Any
    b: Any


def describe(end: Path) -> GPTModelProvider:
    """Describe the model of either kind of folder, its run settings at their defaults.

    What a training run has set besides (layout, recomputation) is no part of a config.json, so it is dropped
    by writing the model's config and reading that.
    """
    if not is_megatron_checkpoint(end):
        return provider_of(read_config(end))
    provider = read_model(resolve_checkpoint(end))
    return provider_of(family_named(provider.hf_model_type).hf_config(provider))


def compare_configs(a: Path, b: Path) -> list[ConfigDifference]:
    """List what two ends say differently of their model, down to the keys of nested settings."""
    first, second = (flat({**describe(end).to_dict(), "hf_config": None}) for end in (a, b))
    names = sorted(first | second)
    return [
        ConfigDifference(name, first.get(name), second.get(name))
        for name in names
        if first.get(name) != second.get(name)
    ]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
