"""`bridgeworks plan-parallel`: which parallel layout suits a model and some GPUs, and why."""

import json
import shlex
from pathlib import Path
from typing import Any

from bridge.hf_checkpoint import read_config
from flows.console import print_json, print_table
from recipes.continued_pretraining import continued_pretrain_config
from recipes.pretraining import pretrain_config
from recipes.registry import recipe_named
from training.config import ConfigContainer
from training.overrides import apply_overrides
from training.parallel_plan import USABLE, ParallelPlan, gpu_named, plan_parallel, plan_rows

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")
# the sizes that `bridgeworks train` has options for, and what else a plan decides
OPTIONS = {
    "model.tensor_model_parallel_size": "--tp",
    "model.pipeline_model_parallel_size": "--pp",
    "model.context_parallel_size": "--cp",
    "model.expert_model_parallel_size": "--ep",
    "model.expert_tensor_parallel_size": "--etp",
}
SETTINGS = (
    "model.sequence_parallel",
    "model.virtual_pipeline_model_parallel_size",
    "model.account_for_embedding_in_pipeline_split",
    "model.account_for_loss_in_pipeline_split",
    "model.recompute_granularity",
    "model.recompute_method",
    "model.recompute_num_layers",
    "train.micro_batch_size",
)
# what the estimate was made for, and a training run might have otherwise
ASSUMED = ("model.seq_length", "train.global_batch_size")


def show_plan(model: str, num_gpus: int, gpu: str, changes: list[str], *, as_json: bool) -> None:
    """Print the estimates of the layouts of a recipe's model, or of that in a Hugging Face folder."""
    config = apply_overrides(config_of(model), changes)
    plan = plan_parallel(config, num_gpus, gpu_named(gpu))
    rows, best = plan_rows(plan), plan.best.layout.apply(config)
    command = train_command(model, best, num_gpus, changes)
    if as_json:
        settings = {name: value_of(best, name) for name in (*OPTIONS, *SETTINGS)}
        print_json({"settings": settings, "layouts": rows, "command": command})
        return
    print_rows(model, config, plan, rows)
    print(f"\nTo train in the chosen layout:\n{command} --output RUN")


def config_of(model: str) -> ConfigContainer:
    """Return the config of a recipe, or a pretraining config for a Hugging Face folder."""
    if Path(model).is_dir():
        return pretrain_config(read_config(Path(model)), {})
    return recipe_named(model)()


def train_command(model: str, best: ConfigContainer, num_gpus: int, changes: list[str]) -> str:
    """Return the command that trains in the layout of `best`, with the changes that it was planned for."""
    folder = Path(model).is_dir()
    recipe = continued_pretrain_config() if folder else recipe_named(model)()
    words = [continued_pretrain_config.__name__, "--load", model] if folder else [model]
    for name, option in OPTIONS.items():
        if option not in ("--ep", "--etp") or best.model.num_moe_experts:
            size = best.model.expert_tensor_size if option == "--etp" else value_of(best, name)
            words += [option, str(size)]
    words += ["--dp", str(best.data_parallel_size(num_gpus))]
    decided = [name for name in (*SETTINGS, *ASSUMED) if value_of(best, name) != value_of(recipe, name)]
    kept = [change for change in changes if change.partition("=")[0] not in (*OPTIONS, *SETTINGS, *ASSUMED)]
    for change in (*kept, *(f"{name}={json.dumps(value_of(best, name))}" for name in decided)):
        words += ["--set", change]
    return f"bridgeworks train {shlex.join(words)}"


def value_of(config: ConfigContainer, name: str) -> Any:
    """Return a setting by its dotted name."""
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


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
