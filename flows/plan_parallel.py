"""`bridgeworks plan-parallel`: which parallel layout suits a model and some GPUs, and why."""

import json
from pathlib import Path
from typing import Any

from bridge.hf_checkpoint import read_config
from flows.console import print_json, print_table
from recipes.pretraining import pretrain_config
from recipes.registry import recipe_named
from training.config import ConfigContainer
from training.overrides import apply_overrides
from training.parallel_plan import USABLE, ParallelPlan, gpu_named, plan_parallel, plan_rows

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def show_plan(model: str, num_gpus: int, gpu: str, changes: list[str], *, as_json: bool) -> None:
    """Print the estimates of the layouts of a recipe's model, or of that in a Hugging Face folder."""
    config = apply_overrides(config_of(model), changes)
    plan = plan_parallel(config, num_gpus, gpu_named(gpu))
    rows, chosen = plan_rows(plan), settings_of(plan.best.layout.apply(config))
    if as_json:
        print_json({"settings": chosen, "layouts": rows})
        return
    print_rows(model, config, plan, rows)
    present = settings_of(config)
    changed = {name: json.dumps(value) for name, value in chosen.items() if value != present[name]}
    print(" ".join(f"--set {name}={value}" for name, value in changed.items()) or "the layout it has already")


def config_of(model: str) -> ConfigContainer:
    """Return the config of a recipe, or a pretraining config for a Hugging Face folder."""
    if Path(model).is_dir():
        return pretrain_config(read_config(Path(model)), {})
    return recipe_named(model)()


def settings_of(config: ConfigContainer) -> dict[str, Any]:
    """Return the settings of a layout by dotted name."""
    names = (
        "tensor_model_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
    )
    values = {f"model.{name}": getattr(config.model, name) for name in names}
    return {**values, "train.micro_batch_size": config.train.micro_batch_size}


def print_rows(model: str, config: ConfigContainer, plan: ParallelPlan, rows: list[dict[str, Any]]) -> None:
    title = (
        f"{model} on {plan.num_gpus} x {plan.gpu.name} ({plan.gpu.memory * USABLE:.0f} GiB usable a GPU),"
        f" sequence {config.model.seq_length}, global batch {config.train.global_batch_size}"
    )
    columns = ("layout", "verdict", "GiB a GPU", *PARTS, "tokens/s a GPU", "time goes to")
    cells = [
        (
            row["layout"],
            row["verdict"],
            str(row["memory_gib"]),
            *(str(row[f"{part}_gib"]) for part in PARTS),
            f"{row['tokens_per_second_per_gpu']:,}",
            shares(row["spent_on"]),
        )
        for row in rows
    ]
    print_table(columns, cells, title=title)


def shares(seconds: dict[str, float]) -> str:
    """Say what an iteration's time goes to, in percent, small shares left out."""
    total = sum(seconds.values())
    return ", ".join(
        f"{name} {value / total:.0%}" for name, value in seconds.items() if value / total >= 0.005
    )
