"""Rules of multi-token prediction: layers behind the decoder's that predict the tokens after the next.

DeepSeek-V3 and GLM-4.5 store them as further layers of the model, each with two norms and a projection in
front of it and a norm behind it. Both sides concatenate [embedding, hidden state] in front of the projection.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bridge.config_rules import Config, ConfigRule
from bridge.mapping import DirectMapping, Mapping
from bridge.provider import GPTModelProvider
from bridge.value_types import by_name

LAYER, PREDICTION_LAYER = "decoder.layers.*.", "mtp.layers.*.transformer_layer."
PREDICTION_LAYERS = {"all": "mtp", "dense": "mtp dense", "moe": "mtp moe"}


@dataclass(frozen=True)
class PredictionLayers(ConfigRule):
    """`num_nextn_predict_layers`: how many tokens after the next one are predicted, by a layer each."""

    default: int = 0
    keys = ("num_nextn_predict_layers",)
    value_types = by_name(num_nextn_predict_layers=int | None)

    def read(self, config: Config) -> dict[str, Any]:
        return {"mtp_num_layers": config.get("num_nextn_predict_layers", self.default) or None}

    def write(self, provider: GPTModelProvider) -> dict[str, Any]:
        return {"num_nextn_predict_layers": provider.mtp_num_layers or 0}


def prediction_weights(decoder: Iterable[Mapping]) -> Iterator[Mapping]:
    """Yield the rules of the prediction layers of a model whose decoder layers have these rules."""
    for megatron, hf, shape in (
        ("enorm", "enorm", ("hidden_size",)),
        ("hnorm", "hnorm", ("hidden_size",)),
        ("eh_proj", "eh_proj", ("hidden_size", "prediction_input_size")),
        ("final_layernorm", "shared_head.norm", ("hidden_size",)),
    ):
        yield DirectMapping(
            f"mtp.layers.*.{megatron}.weight", f"model.layers.*.{hf}.weight", shape, layers="mtp"
        )
    for rule in decoder:
        assert rule.megatron_param.startswith(LAYER), rule.megatron_param
        yield dataclasses.replace(
            rule,
            megatron_param=rule.megatron_param.replace(LAYER, PREDICTION_LAYER),
            layers=PREDICTION_LAYERS[rule.layers],
        )


PREDICTION_COPIES = {
    "model.layers.*.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.*.shared_head.head.weight": "lm_head.weight",
}
"""Tensors that released checkpoints repeat in each prediction layer, for engines that serve it alone."""
