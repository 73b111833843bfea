"""The live side of multi-token prediction: its block's spec, and logits without labels."""

import copy
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from bridge.layer_spec import one_layer, uses_transformer_engine
from bridge.provider import GPTModelProvider


class PredictingGPTModel(GPTModel):
    """GPTModel with multi-token prediction, whose decoder answers alone where there are no labels.

    Megatron's needs labels to compute the prediction loss (models/gpt/gpt_model.py, _postprocess), and runs
    prediction layers for nothing without.
    """

    config: TransformerConfig

    def _postprocess(self, *, labels: Tensor | None, mtp_in_postprocess: bool, **options: Any) -> Tensor:
        if labels is not None:
            return super()._postprocess(labels=labels, mtp_in_postprocess=mtp_in_postprocess, **options)
        config, self.config = self.config, copy.copy(self.config)
        self.config.mtp_num_layers = None
        try:
            return super()._postprocess(labels=None, mtp_in_postprocess=False, **options)
        finally:
            self.config = config

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's own, which forgets its default metadata where the embedding is held a second time."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)


def prediction_spec(
    provider: GPTModelProvider, config: TransformerConfig, vp_stage: int | None
) -> ModuleSpec | None:
    """Return the prediction layers of this pipeline stage; None if it has none."""
    if config.mtp_num_layers is None:
        return None
    # like the decoder's last one, which may be in another stage
    layer = one_layer(provider, config, experts=provider.moe_layers[-1])
    return get_gpt_mtp_block_spec(config, layer, uses_transformer_engine(provider), vp_stage)
