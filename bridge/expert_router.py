"""The router of a mixture of experts, with losses that weigh the same in every parallel layout."""

import copy
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter


class ExpertRouter(TopKRouter):
    """Megatron's router, exact where ranks share a sequence and gradients are divided by all their tokens.

    Megatron then multiplies a rank's part of the balancing loss and the z-loss by that rank's tokens alone
    (megatron/core/transformer/moe/router.py, attach_and_log_load_balancing_loss and apply_z_loss).
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, **options: Any
    ) -> None:
        if config.calculate_per_token_loss:
            config, ranks = copy.copy(config), pg_collection.tp_cp.size()
            config.moe_aux_loss_coeff *= ranks
            if config.moe_z_loss_coeff is not None:
                config.moe_z_loss_coeff *= ranks
        super().__init__(config, pg_collection, **options)
