"""What the pretraining recipes of all families have in common."""

from typing import Any

from bridge.families import provider_of
from training.config import ConfigContainer, OptimizerConfig, SchedulerConfig, TrainingConfig

TRAIN_ITERS = 100_000
SEQ_LENGTH = 8192
GLOBAL_BATCH_SIZE = 512


def pretrain_config(
    hf_config: dict[str, Any],
    *,
    lr: float = 3e-4,
    seq_length: int = SEQ_LENGTH,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
) -> ConfigContainer:
    """Return a config that trains the model of a Hugging Face config from random weights."""
    model = provider_of(hf_config)
    model.seq_length = min(seq_length, model.max_position_embeddings)
    model.tensor_model_parallel_size = tensor
    model.pipeline_model_parallel_size = pipeline
    model.context_parallel_size = context
    model.sequence_parallel = tensor > 1
    return ConfigContainer(
        model=model,
        train=TrainingConfig(
            train_iters=TRAIN_ITERS, global_batch_size=GLOBAL_BATCH_SIZE, eval_interval=1000, eval_iters=32
        ),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr / 10),
        scheduler=SchedulerConfig(lr_warmup_iters=2000),
    )
