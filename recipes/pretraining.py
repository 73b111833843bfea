"""What the pretraining recipes of all families have in common."""

from typing import Any

from bridge.errors import ConfigError
from bridge.families import provider_of
from training.config import ConfigContainer, DatasetConfig, OptimizerConfig, SchedulerConfig, TrainingConfig
from training.overrides import apply_overrides, override_names

TRAIN_ITERS = 100_000
SEQ_LENGTH = 8192
GLOBAL_BATCH_SIZE = 512


def pretrain_config(
    hf_config: dict[str, Any],
    changes: dict[str, Any],
    *,
    lr: float = 3e-4,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
) -> ConfigContainer:
    """Return a config that trains the model of a Hugging Face config from random weights.

    `changes` are settings by the names of their fields, such as {"seq_length": 1024, "train_iters": 10}.
    Until `dataset.paths` names text, the run reads made-up sequences.
    """
    model = provider_of(hf_config)
    model.seq_length = min(SEQ_LENGTH, model.max_position_embeddings)
    model.tensor_model_parallel_size = changes.get("tensor_model_parallel_size", tensor)
    model.pipeline_model_parallel_size = pipeline
    model.context_parallel_size = context
    model.sequence_parallel = model.tensor_model_parallel_size > 1
    lr = changes.get("lr", lr)
    config = ConfigContainer(
        model=model,
        train=TrainingConfig(
            train_iters=TRAIN_ITERS, global_batch_size=GLOBAL_BATCH_SIZE, eval_interval=1000, eval_iters=32
        ),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr / 10),
        scheduler=SchedulerConfig(lr_warmup_iters=min(2000, changes.get("train_iters", TRAIN_ITERS) // 10)),
        dataset=DatasetConfig(mock=True),
    )
    return apply_overrides(config, {dotted_name(config, name): value for name, value in changes.items()})


def dotted_name(config: ConfigContainer, field: str) -> str:
    """Return the one setting whose field is called so; ConfigError if there is none, or more than one."""
    found = [name for name in override_names(config) if name.partition(".")[2] == field]
    if len(found) > 1:
        raise ConfigError(
            f"{field!r} may be {' or '.join(found)}: set it on the config that the recipe returns"
        )
    return found[0] if found else field
