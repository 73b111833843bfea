"""The families, one file for each Hugging Face `model_type`; a file here is registered by existing."""

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from bridge.config_rules import check_types
from bridge.errors import ConfigError, UnsupportedModelError
from bridge.family import Family
from bridge.mapping import WeightPlan
from bridge.provider import GPTModelProvider

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "bridgeworks.families"
"""The entry points by which packages offer families."""

OTHER_NAMES = {"kimi_k2": "deepseek_v3"}
"""Names that released models have instead of their family's, by which other programs tell them apart."""


@cache
def families() -> dict[str, Family]:
    """Return every family by model_type: those of this folder and those of installed packages.

    A package offers one by an entry point in GROUP that names a `Family`. One that cannot be loaded, or that
    is there already, is a ConfigError.
    """
    from importlib.metadata import entry_points  # a tenth of what a conversion has to import

    own = [
        importlib.import_module(f"{__name__}.{module.name}").FAMILY
        for module in pkgutil.iter_modules(__path__)
    ]
    found = {family.model_type: family for family in own}
    for entry in entry_points(group=GROUP):
        family = _load(entry)
        if family.model_type in found:
            raise ConfigError(
                f"{_origin(entry)} offers a family {family.model_type!r}, but there is one: remove either"
            )
        found[family.model_type] = family
    return dict(sorted(found.items()))


def _load(entry: "EntryPoint") -> Family:
    try:
        family = entry.load()
    except Exception as error:  # whatever a module raises that somebody else wrote
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{_origin(entry)} cannot be loaded: {reason}; mend or remove the package"
        ) from error
    if not isinstance(family, Family):
        raise ConfigError(f"{_origin(entry)} is no bridge.family.Family, but {type(family).__name__}")
    return family


def _origin(entry: "EntryPoint") -> str:
    package = entry.dist.name if entry.dist else "an installed package"
    return f"{GROUP} {entry.value} of {package}"


def family_named(model_type: str) -> Family:
    """Return the family of a `model_type`, or raise UnsupportedModelError."""
    # One of ours needs no look at the others: a conversion starts in a fraction of the time.
    if model_type in {module.name for module in pkgutil.iter_modules(__path__)}:
        return importlib.import_module(f"{__name__}.{model_type}").FAMILY
    if named := OTHER_NAMES.get(model_type):
        raise UnsupportedModelError(
            f"unknown model_type {model_type!r}, to transformers as well: such models are of the family"
            f" {named!r}, so write that as model_type into config.json"
        )
    if model_type not in families():
        raise UnsupportedModelError(
            f"unknown model_type {model_type!r}: known are {', '.join(families())}"
            " (docs/adding_a_family.md shows how to add one)"
        )
    return families()[model_type]


def family_of(config: dict[str, Any]) -> Family:
    """Return the family of a Hugging Face config."""
    if "model_type" not in config:
        raise UnsupportedModelError("config.json has no model_type: not a Hugging Face model config")
    check_types(config, {"model_type": str})
    return family_named(config["model_type"])


def provider_of(config: dict[str, Any]) -> GPTModelProvider:
    """Describe the model of a Hugging Face config in Megatron's words."""
    return family_of(config).provider(config)


def plan_weights(provider: GPTModelProvider) -> WeightPlan:
    """Spell out every block between the two ends of a model."""
    return family_named(provider.hf_model_type).weights.plan(provider)
