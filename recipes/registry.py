"""The recipes by name: every function of a module in `recipes` whose name ends in `_config`."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

import recipes
from bridge.errors import ConfigError
from training.config import ConfigContainer

Recipe = Callable[..., ConfigContainer]


@cache
def all_recipes() -> dict[str, Recipe]:
    """Return every recipe by its name; none needs an argument."""
    found = {}
    for module in pkgutil.iter_modules(recipes.__path__, "recipes."):
        for name, function in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
            if name.endswith("_config") and not required_parameters(function):
                found[name] = function
    return dict(sorted(found.items()))


def required_parameters(function: Callable[..., Any]) -> list[str]:
    """Return the parameters without which a function cannot be called."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def recipe_named(name: str) -> Recipe:
    """Return the recipe called `name`; an unknown name is a ConfigError that names the nearest one."""
    if name not in all_recipes():
        nearest = difflib.get_close_matches(name, all_recipes(), n=1, cutoff=0.0)[0]
        raise ConfigError(f"no recipe is called {name!r}: did you mean {nearest!r}?")
    return all_recipes()[name]
