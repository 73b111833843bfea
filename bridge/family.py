"""A family: all models of one Hugging Face `model_type`, as data."""

from dataclasses import dataclass
from typing import Any

from bridge.config_rules import OWN_CODE, ConfigRule, check_types
from bridge.errors import UnsupportedModelError
from bridge.mapping import MegatronMappingRegistry
from bridge.provider import GPTModelProvider
from bridge.quantization import without_quantization


@dataclass(frozen=True)
class Family:
    """Config rules and weight rules of one `model_type`, each used in both directions."""

    model_type: str
    architecture: str
    covers: tuple[str, ...]
    """Released models that the family is meant for, for people to read."""
    config: tuple[ConfigRule, ...]
    weights: MegatronMappingRegistry
    needs_gpu: tuple[str, ...] = ()
    """Those of `bridge.family_checks` that no CPU can run: only Transformer Engine has the modules."""

    def provider(self, config: dict[str, Any]) -> GPTModelProvider:
        """Read a Hugging Face config.

        A key that no rule consumes and a value that no rule can compute with are an UnsupportedModelError.
        How the files quantise the weights is not part of the model: they are read as what they stand for.
        """
        config = without_quantization(config)
        self._check_keys(config)
        for rule in self.config:
            check_types(config, rule.value_types)
        fields: dict[str, Any] = {}
        for rule in self.config:
            fields.update(rule.read(config))
        return GPTModelProvider(**fields, hf_model_type=self.model_type, hf_config=dict(config)).finalize()

    def hf_config(self, provider: GPTModelProvider) -> dict[str, Any]:
        """Return the Hugging Face config of a model, in the spelling and order of the config it came from."""
        source = provider.hf_config
        written: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for rule in self.config:
            written.update(self._keys_of(rule, provider))
        kept = {key: written.pop(key) for key in source if key in written}
        return {**kept, **written}

    def _keys_of(self, rule: ConfigRule, provider: GPTModelProvider) -> dict[str, Any]:
        """Keep the source's own spelling as long as it still means what the provider says."""
        if not rule.travels:
            return rule.write(provider)
        source = provider.hf_config
        meant = rule.read(source) if source else None
        written = rule.write(provider)
        if meant is not None and all(getattr(provider, name) == value for name, value in meant.items()):
            return {key: source[key] for key in rule.keys if key in source}
        return written

    def _check_keys(self, config: dict[str, Any]) -> None:
        known = {"model_type"}.union(*(rule.keys for rule in self.config))
        if unknown := sorted(set(config) - known):
            advice = OWN_CODE if unknown[0] == "auto_map" else "a wrong conversion cannot be ruled out"
            raise UnsupportedModelError(
                f"config.json has key {unknown[0]!r} (value {config[unknown[0]]!r}), which the family"
                f" {self.model_type!r} has no rule for: {advice}"
            )
