"""The ends of a comparison: folders of either kind, and what describes one that does not itself."""

from pathlib import Path
from typing import NamedTuple

from bridge.errors import CheckpointError, ConfigError
from bridge.families import family_named, provider_of
from bridge.hf_checkpoint import read_config
from bridge.megatron_arguments import read_arguments
from bridge.megatron_checkpoint import (
    MODEL,
    MegatronCheckpoint,
    is_megatron_checkpoint,
    model_of,
    resolve_checkpoint,
)
from bridge.provider import GPTModelProvider


class GivenModel(NamedTuple):
    """What describes the model of ends of plain Megatron-LM; other ends describe their own.

    `config_from` is a folder of either kind, whose model the arguments of the training must not contradict;
    `family` a `model_type`, whose config is made from those arguments.
    """

    config_from: Path | None = None
    family: str | None = None


NOTHING = GivenModel()


def is_described(end: Path) -> bool:
    """Say whether a folder describes its model: all but those of plain Megatron-LM do."""
    return not is_megatron_checkpoint(end) or (resolve_checkpoint(end) / MODEL).is_file()


def given_for(a: Path, b: Path, config_from: Path | None, family: str | None) -> GivenModel:
    """Return what the user gave, or let the other end describe the one that does not itself.

    Too little and too much are an InputError.
    """
    plain = [end for end in (a, b) if not is_described(end)]
    if config_from or family:
        if not plain:
            raise ConfigError("both ends describe their models: leave out --config-from and --family")
        return GivenModel(config_from, family)
    if len(plain) == 2:
        raise CheckpointError(
            f"neither {a} nor {b} describes its model: name a folder that does (--config-from) or the family"
            " (--family)"
        )
    if not plain:
        return NOTHING
    if read_arguments(resolve_checkpoint(plain[0])) is None:
        raise CheckpointError(
            f"{plain[0]} has neither {MODEL} nor arguments of Megatron-LM to hold against the other end: name"
            " a folder of the same model (--config-from)"
        )
    return GivenModel(config_from=b if plain[0] == a else a)


def open_megatron(end: Path, given: GivenModel = NOTHING) -> MegatronCheckpoint:
    """Open a Megatron end; anything wrong with it, and any contradiction, is an InputError."""
    return MegatronCheckpoint.open(end, *(NOTHING if is_described(end) else given))


def describe(end: Path, given: GivenModel = NOTHING) -> GPTModelProvider:
    """Describe the model of either kind of folder, its run settings at their defaults.

    What a training run has set besides (layout, recomputation) is no part of a config.json, so it is dropped
    by writing the model's config and reading that.
    """
    if not is_megatron_checkpoint(end):
        return provider_of(read_config(end))
    provider = model_of(resolve_checkpoint(end), *(NOTHING if is_described(end) else given))
    return provider_of(family_named(provider.hf_model_type).hf_config(provider))
