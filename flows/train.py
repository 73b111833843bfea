"""`bridgeworks train`: one training job by torchrun, outside of any release."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.errors import InputError
from bridge.pretrained import read_model, resolve_pretrained
from flows.console import Progress, person_watches, print_json, print_table, progress
from recipes.registry import recipe_named
from tasks.launch import launch
from tasks.restart import run_with_restarts
from tasks.spec import ParallelSpec, TrainSpec, override
from tasks.train import resolved_config
from training.blend import check_files, with_absolute_paths
from training.config import ConfigContainer
from training.metrics import read_metrics
from training.overrides import apply_overrides

SECONDS_BETWEEN_READS = 1.0
SIZES = tuple(f"model.{name}" for name in ParallelSpec.model_fields)


def train(
    recipe: str,
    load: Path | None,
    dataset: Path | None,
    output: Path,
    layout: dict[str, int],
    copies: int,
    changes: list[str],
    *,
    max_restarts: int,
    as_json: bool,
) -> None:
    """Run the job and show what came of it; what `output` holds of an earlier run is gone on with."""
    parallel = ParallelSpec(**layout, data_parallel_size=copies)
    weights = resolve_pretrained(load.absolute()) if load else None
    config = make_config(recipe, weights, parallel, changes)
    if dataset is not None:
        config.dataset.blend = [str(dataset)]
    config.validate(parallel.num_processes)
    check_dataset(config)
    config.dataset = with_absolute_paths(config.dataset)
    output = output.absolute()
    metrics = output / "metrics.jsonl"
    job = {
        "config": config.to_dict(),
        "load": str(weights) if weights else None,
        "output": str(output / "checkpoints"),
        "metrics": str(metrics),
    }
    with progress("training") as show:

        def start(name: str) -> dict[str, Any]:
            return launch(
                "training.pretrain",
                job,
                folder=output / name,
                num_processes=parallel.num_processes,
                on_line=None if person_watches() or as_json else print,
                on_tick=follow(metrics, config.train.train_iters, show),
            )

        report = run_with_restarts(
            start,
            checkpoints=output / "checkpoints",
            folder=output,
            max_restarts=max_restarts,
            log=lambda line: print(line, file=sys.stderr),
        )
    report["attempts"] = len(report["attempts"])
    summary = {"checkpoints": job["output"], "metrics": str(metrics), **report, **losses(metrics)}
    print_json(summary) if as_json else print_table(("what", "value"), list(summary.items()))


def check_dataset(config: ConfigContainer) -> None:
    """Refuse data that the run could not read, before any process starts."""
    data = config.dataset
    if data.mock and not (data.blend or data.blend_per_split):
        return
    splits = ["train"] if config.train.eval_interval is None else ["train", "valid"]
    check_files(data, splits, config.model.seq_length, config.model.vocab_size)


def make_config(
    recipe: str, load: Path | None, parallel: ParallelSpec, changes: list[str]
) -> ConfigContainer:
    """Return the recipe's config with the changes, its model that of the checkpoint where there is one."""
    if wrong := next((change for change in changes if change.partition("=")[0] in SIZES), None):
        raise InputError(f"{wrong}: give parallel sizes by --tp, --pp and --dp")
    if load:
        overrides = override({}, [f"train.overrides.{change}" for change in changes]).get("train", {})
        return resolved_config(TrainSpec(recipe=recipe, parallel=parallel, **overrides), read_model(load))
    config = recipe_named(recipe)()
    for name, size in parallel.model_sizes.items():
        setattr(config.model, name, size)
    return apply_overrides(config, changes)


def follow(metrics: Path, train_iters: int, show: Progress) -> Callable[[], None]:
    """Return a function that, called often, shows now and then which iteration the job has reached."""
    state = {"next": 0.0, "size": -1}

    def tick() -> None:
        if time.monotonic() < state["next"] or not metrics.is_file():
            return
        state["next"] = time.monotonic() + SECONDS_BETWEEN_READS
        if (size := metrics.stat().st_size) != state["size"]:
            state["size"] = size
            if records := read_metrics(metrics):
                show(records[-1]["iteration"], train_iters)

    return tick


def losses(metrics: Path) -> dict[str, Any]:
    """Return the first and the last loss of the run."""
    found = [record["loss"] for record in read_metrics(metrics) if "loss" in record]
    return {"first_loss": found[0], "last_loss": found[-1]} if found else {}
