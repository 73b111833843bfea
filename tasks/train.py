"""The step that trains the imported checkpoint on, going on from the last complete checkpoint."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from bridge.megatron_checkpoint import read_model
from bridge.provider import GPTModelProvider
from recipes.registry import recipe_named
from tasks.artifact import Kind
from tasks.code_version import COMPUTING
from tasks.metrics_follower import MetricsFollower
from tasks.plan import flatten
from tasks.restart import run_with_restarts
from tasks.spec import ParallelSpec, ReleaseSpec, TrainSpec
from tasks.step import Artifacts, Step, StepContext
from training.config import ConfigContainer
from training.config_checks import check_shapes
from training.overrides import apply_overrides
from training.run_settings import FUSIONS

METRICS_FILE = "metrics.jsonl"
LONGEST_DEFAULT = 4096  # tokens; a checkpoint's longest context is no sensible length of training samples
# what a recipe says about the model's run; the checkpoint says what the model is
RUN_FIELDS = (
    *("seq_length", "transformer_impl", "sequence_parallel", "attention_dropout", "hidden_dropout"),
    *("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"),
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    *("cpu_offloading", "cpu_offloading_num_layers", "cpu_offloading_activations", "cpu_offloading_weights"),
    *(*FUSIONS, "cross_entropy_fusion_impl"),
)


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    """Run the training job, pass its curves on while it runs, and check them at the end."""
    from tasks.tables import check_metrics  # pandas, which a plan can do without

    config = resolved_config(spec.train, read_model(artifacts["import"].payload))
    context.run.log_params(flatten(config.to_dict()))
    config.dataset.blend = [str(artifacts["build_dataset"].payload)]
    # what Megatron works out about its samples is no part of the result
    indices = folder / "sample_indices"
    config.dataset.path_to_cache = str(indices)
    config.tokenizer.tokenizer_model = str(artifacts["fetch"].payload)
    metrics = folder / METRICS_FILE
    job = {
        "config": config.to_dict(),
        "load": str(artifacts["import"].payload),
        "output": str(folder / "checkpoints"),
        "metrics": str(metrics),
    }
    follower = MetricsFollower(metrics, config.train.train_iters, context)

    def start(name: str) -> dict[str, Any]:
        return context.launch(
            "training.pretrain",
            job,
            name=name,
            num_processes=spec.train.parallel.num_processes,
            timeout=spec.train.timeout_minutes and spec.train.timeout_minutes * 60,
            grace=spec.train.stop_grace_seconds,
            on_tick=follower.tick,
        )

    try:
        report = run_with_restarts(
            start,
            checkpoints=folder / "checkpoints",
            folder=context.folder,
            max_restarts=spec.train.max_restarts,
            log=context.log,
        )
    finally:
        follower.deliver()
    done, total = report["iteration"], config.train.train_iters
    context.progress(done, total, f"iteration {done} of {total}")
    shutil.rmtree(indices, ignore_errors=True)
    return {**report, **check_metrics(metrics)}


def config(spec: ReleaseSpec, artifacts: Artifacts) -> dict[str, Any]:
    """Return the resolved training config; where things lie does not decide what comes out."""
    resolved = resolved_config(spec.train, read_model(artifacts["import"].payload)).to_dict()
    parallel = spec.train.parallel
    return {
        **resolved,
        "data_parallel_size": parallel.data_parallel_size,
        "num_processes": parallel.num_processes,
    }


def resolved_config(train: TrainSpec, model: GPTModelProvider) -> ConfigContainer:
    """Return the recipe's config for `model` with the changes of `train`; what cannot be is a ConfigError."""
    config = apply_overrides(config_for(train.recipe, train.parallel, model), train.overrides)
    check_shapes(config.model, model)
    return config.validate(train.parallel.num_processes)


def config_for(recipe: str, parallel: ParallelSpec, model: GPTModelProvider) -> ConfigContainer:
    """Return the recipe's config for another model, spread as `parallel` says."""
    config = recipe_named(recipe)()
    settings: dict[str, Any] = {name: getattr(config.model, name) for name in RUN_FIELDS}
    settings["seq_length"] = settings["seq_length"] or min(model.max_position_embeddings, LONGEST_DEFAULT)
    config.model = dataclasses.replace(model, **(settings | parallel.model_sizes))
    return config


STEP = Step(
    name="train",
    kind=Kind.TRAINING_RUN,
    needs=("fetch", "import", "build_dataset"),
    config=config,
    build=build,
    sources=("bridge", "training", __name__),
    distributions=COMPUTING,
    resumable=True,
)
