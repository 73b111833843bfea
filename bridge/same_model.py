"""Whether two descriptions are of one model, so that either's weights mean the same in both."""

from typing import Any

from bridge.compare_configs import flat
from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider

# What a config says of training, or of the numbers' dtype: weights mean the same whatever it is.
NOT_COMPUTED = {
    "hf_config",
    "params_dtype",
    "seq_length",
    "init_method_std",
    "attention_dropout",
    "hidden_dropout",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_load_balancing_type",
    "moe_router_bias_update_rate",
    "mtp_loss_scaling_factor",
}
# Kinds of rope that reckon with the longest sequence; for others it is only a limit.
BY_LENGTH = ("dynamic", "yarn", "longrope")


def check_same_model(here: GPTModelProvider, there: GPTModelProvider, where: str) -> None:
    """Raise a ConfigError that names all settings by which weights from `where` mean something else here."""
    first, second = computed(here), computed(there)
    different = sorted(n for n in first | second if first.get(n) != second.get(n))
    if different:
        lines = [f"{name} is {second.get(name)!r} there and {first.get(name)!r} here" for name in different]
        raise ConfigError(
            f"{where} is not of this bridge's model: {'; '.join(lines)}: make a bridge of that folder"
        )


def computed(provider: GPTModelProvider) -> dict[str, Any]:
    """Return the settings that decide what a model computes from its weights, under dotted names."""
    ignored = set(NOT_COMPUTED)
    if provider.rope_parameters["rope_type"] not in BY_LENGTH:
        ignored.add("max_position_embeddings")
    return flat({name: value for name, value in provider.to_dict().items() if name not in ignored})
