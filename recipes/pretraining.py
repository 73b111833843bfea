"""What the pretraining recipes of all families have in common."""

from typing import Any

from bridge.errors import ConfigError
from bridge.families import provider_of
from training.config import (
    ConfigContainer,
    DatasetConfig,
    DistributedDataParallelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainingConfig,
)
from training.overrides import apply_overrides, override_names
from training.parallel_plan import gpu_named, plan_parallel

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
    virtual: int | None = None,
    outer_count: bool = False,
    context: int = 1,
    expert: int = 1,
) -> ConfigContainer:
    """Return a config that trains the model of a Hugging Face config from random weights.

    `changes` are settings by the names of their fields, such as {"seq_length": 1024, "train_iters": 10};
    {"parallelism": "auto", "num_gpus": 8, "gpu": "h200"} leaves the parallel layout to
    `training.parallel_plan`. Until `dataset.blend` names text, the run reads made-up sequences.
    """
    changes = dict(changes)
    planned = {name: changes.pop(name) for name in ("parallelism", "num_gpus", "gpu") if name in changes}
    model = provider_of(hf_config)
    model.seq_length = min(SEQ_LENGTH, model.max_position_embeddings)
    model.tensor_model_parallel_size = changes.get("tensor_model_parallel_size", tensor)
    model.pipeline_model_parallel_size = pipeline
    if "pipeline_model_parallel_size" not in changes:  # which another number of stages may not divide
        model.virtual_pipeline_model_parallel_size = virtual
        model.account_for_embedding_in_pipeline_split = outer_count
        model.account_for_loss_in_pipeline_split = outer_count
    model.context_parallel_size = context
    model.expert_model_parallel_size = expert
    model.expert_tensor_parallel_size = 1 if expert > 1 else None
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
        ddp=DistributedDataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True),
    )
    config = apply_overrides(config, {dotted_name(config, name): value for name, value in changes.items()})
    return with_parallelism(config, **planned) if planned else config


def with_parallelism(
    config: ConfigContainer, *, parallelism: str = "auto", num_gpus: int = 1, gpu: str = "h100"
) -> ConfigContainer:
    """Return the config in the layout that is estimated to be the quickest on the GPUs named."""
    if parallelism != "auto":
        raise ConfigError(
            f"parallelism is {parallelism!r}: give 'auto', or set the sizes, as in"
            " tensor_model_parallel_size=2"
        )
    return plan_parallel(config, num_gpus, gpu_named(gpu)).best.layout.apply(config)


def dotted_name(config: ConfigContainer, field: str) -> str:
    """Return the one setting whose field is called so; ConfigError if there is none, or more than one."""
    found = [name for name in override_names(config) if name.partition(".")[2] == field]
    if len(found) > 1:
        raise ConfigError(
            f"{field!r} may be {' or '.join(found)}: set it on the config that the recipe returns"
        )
    return found[0] if found else field
