"""Transformer Engine's buffers through which tensor-parallel messages travel behind matrix products."""

import torch

from bridge.errors import ConfigError
from bridge.layer_spec import uses_transformer_engine
from training.config import ConfigContainer


def start_user_buffers(config: ConfigContainer) -> None:
    """Set the buffers up for the shape of every layer's input, if the config overlaps these messages."""
    if not config.comm_overlap.tp_comm_overlap:
        return
    if not uses_transformer_engine(config.model):
        raise ConfigError(
            "comm_overlap.tp_comm_overlap needs Transformer Engine, which is not here: set it to false"
        )
    from transformer_engine.pytorch.module import base

    model = config.model
    mode = base.UserBufferQuantizationMode
    base.initialize_ub(
        shape=[
            model.seq_length * config.train.micro_batch_size // model.context_parallel_size,
            model.hidden_size,
        ],
        tp_size=model.tensor_model_parallel_size,
        quantization_modes=[mode.FP8 if config.mixed_precision.fp8 else mode.NONE],
        dtype=getattr(torch, model.params_dtype),
        bootstrap_backend=config.comm_overlap.tp_comm_bootstrap_backend,
    )
