"""What the pretraining recipes of all families have in common."""

import sys
from typing import Any

from bridge.errors import ConfigError
from bridge.families import provider_of
from bridge.provider import GPTModelProvider
from training.config import (
    ConfigContainer,
    DatasetConfig,
    DistributedDataParallelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from training.overrides import apply_overrides, override_names
from training.parallel_plan import SPLIT, plan_parallel
from training.plan_table import plan_text
from training.time_estimate import gpu_named

TRAIN_ITERS = 100_000
SEQ_LENGTH = 8192
GLOBAL_BATCH_SIZE = 512
PLANNING = ("parallelism", "num_gpus", "gpu")


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
    {"parallelism": "auto", "num_gpus": 8, "gpu": "h200"} leaves what they do not say of the parallel layout
    to `training.parallel_plan`, and prints its table to stderr. Until `dataset.blend` names text, the run
    reads made-up sequences.
    """
    changes = dict(changes)
    planned = {name: changes.pop(name) for name in PLANNING if name in changes}
    model = provider_of(hf_config)
    model.seq_length = min(SEQ_LENGTH, model.max_position_embeddings)
    model.tensor_model_parallel_size = tensor
    model.pipeline_model_parallel_size = pipeline
    model.context_parallel_size = context
    model.expert_model_parallel_size = expert
    model.expert_tensor_parallel_size = 1 if expert > 1 else None
    config = ConfigContainer(
        model=model,
        train=TrainingConfig(
            train_iters=TRAIN_ITERS, global_batch_size=GLOBAL_BATCH_SIZE, eval_interval=1000, eval_iters=32
        ),
        optimizer=OptimizerConfig(lr=lr),
        dataset=DatasetConfig(mock=True),
        ddp=DistributedDataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True),
    )
    named = {dotted_name(config, name): value for name, value in changes.items()}
    apply_overrides(config, named)
    follows = {**what_follows(config), **stage_split(model, virtual, outer_count, set(named))}
    apply_overrides(config, {name: value for name, value in follows.items() if name not in named})
    return with_parallelism(config, set(named), **planned) if planned else config


def what_follows(config: ConfigContainer) -> dict[str, Any]:
    """Return the settings that follow from others where nobody gives them."""
    return {
        "optimizer.min_lr": config.optimizer.lr / 10,
        "scheduler.lr_warmup_iters": min(2000, config.train.train_iters // 10),
        "model.sequence_parallel": config.model.tensor_model_parallel_size > 1,
    }


def stage_split(
    model: GPTModelProvider, virtual: int | None, outer_count: bool, given: set[str]
) -> dict[str, Any]:
    """Return how layers go to the stages: as a recipe wants it, as far as their number allows it.

    `virtual` chunks a stage; with `outer_count` embedding and loss count as a layer each.
    """
    wanted = [(virtual, outer_count), (None, outer_count), (None, False)]
    stages = model.pipeline_model_parallel_size
    possible = (
        (chunks, counted)
        for chunks, counted in wanted
        if stages > 1 and (model.num_layers + 2 * counted) % (stages * (chunks or 1)) == 0
    )
    chunks, counted = (None, False) if given & SPLIT else next(possible, (None, False))
    return {
        "model.virtual_pipeline_model_parallel_size": chunks,
        "model.account_for_embedding_in_pipeline_split": counted,
        "model.account_for_loss_in_pipeline_split": counted,
    }


def with_parallelism(
    config: ConfigContainer,
    given: set[str],
    *,
    parallelism: str | None = None,
    num_gpus: int | None = None,
    gpu: str = "h100",
) -> ConfigContainer:
    """Return the config in the layout that is estimated to be the quickest, and print why.

    Settings of a layout that are `given` stay.
    """
    if parallelism != "auto":
        raise ConfigError(
            f"parallelism is {parallelism!r}: give 'auto' beside num_gpus and gpu, or leave all three out and"
            " set the sizes, as in tensor_model_parallel_size=2"
        )
    chip = gpu_named(gpu)
    if not isinstance(num_gpus, int) or num_gpus < 1:
        raise ConfigError(f"num_gpus is {num_gpus}: parallelism='auto' needs the number of the job's GPUs")
    plan = plan_parallel(config, num_gpus, chip, given)
    choice = plan.choice
    print(
        plan_text(f"{config.model.hf_model_type} of {config.model.num_layers} layers", plan), file=sys.stderr
    )
    return choice


def dotted_name(config: ConfigContainer, field: str) -> str:
    """Return the setting whose field is called so, the model's if there are several.

    ConfigError if none of several is the model's; a name without a setting is returned as it is.
    """
    found = [name for name in override_names(config) if name.partition(".")[2] == field]
    if len(found) > 1 and f"model.{field}" not in found:
        raise ConfigError(f"{field!r} may be {' or '.join(found)}: set it on the config that is returned")
    return next((name for name in found if name.startswith("model.") or len(found) == 1), field)
