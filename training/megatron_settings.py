"""A config's sections as Megatron Core's own dataclasses."""

import dataclasses
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from bridge import model
from bridge.errors import ConfigError
from bridge.layer_spec import uses_transformer_engine
from training import wgrad_fusion
from training.config import ConfigContainer
from training.config_checks import OPTIMIZER_DTYPES
from training.run_settings import run_settings

FP8_FIELDS = (
    "fp8",
    "fp8_recipe",
    "fp8_param",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "fp8_wgrad",
    "fp8_dot_product_attention",
    "fp8_multi_head_attention",
    "tp_only_amax_red",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
)
LOSS_SCALE_FIELDS = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")


def transformer_settings(config: ConfigContainer) -> TransformerConfig:
    """Return the config of the model's modules: what the model is, and how this run computes it."""
    transformer_engine = uses_transformer_engine(config.model)
    flex = config.model.num_moe_experts and config.model.moe_token_dispatcher_type == "flex"
    if flex and importlib.util.find_spec("deep_ep") is None:
        raise ConfigError(
            "model.moe_token_dispatcher_type flex needs the package deep_ep, which is not here: choose"
            " alltoall"
        )
    settings = run_settings(config.model, transformer_engine)
    if settings["gradient_accumulation_fusion"]:
        wgrad_fusion.install()
    try:
        return model.transformer_config(
            config.model,
            **settings,
            **values(config.mixed_precision, FP8_FIELDS),
            **values(config.comm_overlap),
            deterministic_mode=bool(config.train.deterministic_mode),
            # the mean is over the tokens of the whole batch, however ranks and micro-batches share them
            calculate_per_token_loss=True,
            finalize_model_grads_func=finalize_model_grads,
        )
    except (AssertionError, ValueError) as error:  # how its __post_init__ refuses what does not go together
        raise ConfigError(f"Megatron Core refuses these settings of the model: {error}") from error


def ddp_settings(config: ConfigContainer) -> DistributedDataParallelConfig:
    """Return the config of Megatron's data parallelism."""
    return DistributedDataParallelConfig(
        **{**values(config.ddp), "check_for_nan_in_grad": checks_gradients(config)},
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=config.mixed_precision.grad_reduce_in_fp32,
        fp8_param_gather=config.mixed_precision.fp8_param,
    )


def checks_gradients(config: ConfigContainer) -> bool:
    """Say whether a gradient that is no number ends the run; in fp16 it lowers the loss scale instead."""
    return config.ddp.check_for_nan_in_grad and not config.mixed_precision.fp16


def optimizer_settings(config: ConfigContainer) -> OptimizerConfig:
    """Return the config of Megatron's distributed Adam, with master weights where the model has 16 bits."""
    if (
        config.optimizer.use_precision_aware_optimizer
        and importlib.util.find_spec("transformer_engine") is None
    ):
        raise ConfigError(
            "optimizer.use_precision_aware_optimizer is Transformer Engine's Adam, which is not here: set it"
            " to false"
        )
    precision = config.mixed_precision
    dtypes = {name: getattr(torch, getattr(config.optimizer, name)) for name in OPTIMIZER_DTYPES}
    return OptimizerConfig(
        **{**values(config.optimizer), **dtypes},
        **values(precision, LOSS_SCALE_FIELDS),
        optimizer="adam",
        bf16=precision.bf16,
        fp16=precision.fp16,
        fp8_recipe=precision.fp8_recipe if precision.fp8 else None,
        params_dtype=getattr(torch, precision.params_dtype),
        use_distributed_optimizer=True,
        overlap_param_gather=config.ddp.overlap_param_gather,
        # of a master weight the lower 16 bits alone would be kept, which no other layout could load
        store_param_remainders=False,
    )


def values(section: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return fields of a section by name, all by default."""
    chosen = names or [field.name for field in dataclasses.fields(section)]
    return {name: getattr(section, name) for name in chosen}
