"""`bridgeworks plan-parallel`: which parallel layout suits a model and some GPUs, and why."""

import json
import shlex
from pathlib import Path

from bridge.hf_checkpoint import read_config
from flows.console import print_json, print_table
from recipes.continued_pretraining import continued_pretrain_config
from recipes.pretraining import pretrain_config
from recipes.registry import recipe_named
from training.config import ConfigContainer
from training.overrides import apply_overrides
from training.parallel_plan import DECIDED, plan_parallel, setting
from training.plan_table import COLUMNS, plan_cells, plan_rows, plan_title
from training.time_estimate import gpu_named

# the sizes that `bridgeworks train` has options for, and what else a plan decides
OPTIONS = {
    "model.tensor_model_parallel_size": "--tp",
    "model.pipeline_model_parallel_size": "--pp",
    "model.context_parallel_size": "--cp",
    "model.expert_model_parallel_size": "--ep",
    "model.expert_tensor_parallel_size": "--etp",
}
SETTINGS = tuple(name for name in DECIDED if name not in OPTIONS)
# what the estimate was made for, and a training run might have otherwise
ASSUMED = ("model.seq_length", "train.global_batch_size")


def show_plan(model: str, num_gpus: int, gpu: str, changes: list[str], *, as_json: bool) -> None:
    """Print the estimates of the layouts of a recipe's model, or of that in a Hugging Face folder.

    What `changes` say of a layout is not searched.
    """
    config = apply_overrides(config_of(model), changes)
    plan = plan_parallel(config, num_gpus, gpu_named(gpu), changed_names(changes))
    best, rows = plan.choice, plan_rows(plan)
    command = train_command(model, best, num_gpus, changes)
    if as_json:
        settings = {name: setting(best, name) for name in (*OPTIONS, *SETTINGS)}
        print_json({"settings": settings, "layouts": rows, "command": command})
        return
    print_table(COLUMNS, plan_cells(rows), title=plan_title(model, plan))
    print(f"\nTo train in the chosen layout:\n{command} --output RUN")


def changed_names(changes: list[str]) -> set[str]:
    """Return the names that changes such as "section.field=value" set."""
    return {change.partition("=")[0].strip() for change in changes}


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
            size = best.model.expert_tensor_size if option == "--etp" else setting(best, name)
            words += [option, str(size)]
    words += ["--dp", str(best.data_parallel_size(num_gpus))]
    decided = [name for name in (*SETTINGS, *ASSUMED) if setting(best, name) != setting(recipe, name)]
    kept = [change for change in changes if changed_names([change]).isdisjoint({*DECIDED, *ASSUMED})]
    for change in (*kept, *(f"{name}={json.dumps(setting(best, name))}" for name in decided)):
        words += ["--set", change]
    return f"bridgeworks train {shlex.join(words)}"
