"""`bridgeworks train`: one training job by torchrun, outside of any release."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge.errors import InputError
from bridge.folder_lock import locked
from bridge.pretrained import read_model, resolve_pretrained
from flows.console import Progress, person_watches, print_json, print_table, progress
from flows.layouts import ranks_in_words, with_ranks
from flows.stop_request import StopRequest, noting_stops
from recipes.registry import recipe_named
from tasks.errors import JobStoppedError
from tasks.gpus import check_gpus
from tasks.launch import launch
from tasks.restart import run_with_restarts
from tasks.spec import ParallelSpec
from tasks.train import config_for
from training.blend import check_files, with_absolute_paths
from training.config import ConfigContainer
from training.config_checks import check_shapes
from training.config_paths import check_tokenizer, check_written, make_paths_absolute
from training.metrics import read_metrics
from training.overrides import apply_overrides

SECONDS_BETWEEN_READS = 1.0
BUSY = "is the folder of a run that is at work: wait for it, stop it, or give another --output"
OPTIONS = "--tp, --pp, --cp, --ep, --etp and --dp"
GIVEN_BY = {
    **{f"model.{name}": f"give parallel sizes by {OPTIONS}" for name in ParallelSpec.model_fields},
    "checkpoint.save": "give the run's folder by --output",
    "checkpoint.pretrained_checkpoint": "give the checkpoint to start from by --load",
    "logger.metrics_path": "the metrics are in the folder that --output gives",
}


def train(
    recipe: str,
    output: Path,
    *,
    load: Path | None,
    dataset: Path | None,
    sizes: Mapping[str, int | None],
    changes: list[str],
    max_restarts: int,
    grace: float,
    as_json: bool,
) -> None:
    """Run the job and show what came of it; what `output` holds of an earlier run is gone on with.

    `sizes` are those of a ParallelSpec; where one is None, the recipe decides. A job that is told to stop has
    `grace` seconds to save.
    """
    weights = weights_of(load.absolute()) if load else None
    parallel = parallel_of(recipe, sizes)
    config = make_config(recipe, weights, parallel, changes)
    if dataset is not None:
        if config.dataset.blend:
            raise InputError("--dataset and dataset.blend both name the text: leave one out")
        config.dataset.blend = [str(dataset)]
    check(config, parallel)
    config.dataset = with_absolute_paths(config.dataset)
    make_paths_absolute(config, Path.cwd())
    check_tokenizer(config)
    check_written(config)
    job = make_job(config, weights, output.absolute())
    with sole_launcher(output.absolute()), noting_stops(grace) as stop:
        print(f"ranks: {ranks_in_words(with_ranks(parallel))}", file=sys.stderr)
        report = run(job, output.absolute(), parallel.num_processes, max_restarts, stop, not as_json)
    show(job, report, parallel, as_json)


def weights_of(folder: Path) -> Path:
    """Return the checkpoint in a folder of either kind, a run's latest one."""
    if not folder.is_dir():
        raise InputError(
            f"no such checkpoint folder: {folder}; `bridgeworks import hf://organisation/name {folder.name}`"
            " makes one of a model on the hub"
        )
    return resolve_pretrained(folder)


def parallel_of(recipe: str, sizes: Mapping[str, int | None]) -> ParallelSpec:
    """Return the sizes that were given, those of the recipe's own model for the others."""
    model = recipe_named(recipe)().model
    chosen = {name: getattr(model, name) if size is None else size for name, size in sizes.items()}
    return ParallelSpec.model_validate(chosen)


def make_config(
    recipe: str, load: Path | None, parallel: ParallelSpec, changes: list[str]
) -> ConfigContainer:
    """Return the recipe's config with the changes, its model that of the checkpoint where there is one."""
    for change in changes:
        if advice := GIVEN_BY.get(change.partition("=")[0].strip()):
            raise InputError(f"{change}: {advice}")
    if load:
        loaded = read_model(load)
        config = apply_overrides(config_for(recipe, parallel, loaded), changes)
        check_shapes(config.model, loaded)
        return config
    config = recipe_named(recipe)()
    if not config.model.num_layers:
        raise InputError(f"{recipe} trains a model that is there: name its folder with --load")
    for name, size in parallel.model_sizes.items():
        setattr(config.model, name, size)
    return apply_overrides(config, changes)


def check(config: ConfigContainer, parallel: ParallelSpec) -> None:
    """Refuse what the run would fail by, before any process starts."""
    config.validate(parallel.num_processes)
    check_gpus(parallel.num_processes, OPTIONS, config.mixed_precision, config.profiling)
    check_dataset(config)


def check_dataset(config: ConfigContainer) -> None:
    """Refuse data that the run could not read, before any process starts."""
    data = config.dataset
    if data.mock and not (data.blend or data.blend_per_split):
        return
    splits = ["train"] if config.train.eval_interval is None else ["train", "valid"]
    check_files(data, splits, config.model.seq_length, config.model.vocab_size)


@contextmanager
def sole_launcher(folder: Path) -> Iterator[None]:
    """Make the run's folder and keep other launchers off it: each writes its own list of attempts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}; give another --output") from error
    with locked(folder, BUSY):
        yield


def make_job(config: ConfigContainer, load: Path | None, output: Path) -> dict[str, Any]:
    """Return what `training.pretrain` is told."""
    return {
        "config": config.to_dict(),
        "load": str(load) if load else None,
        "output": str(output / "checkpoints"),
        "metrics": str(output / "metrics.jsonl"),
    }


def run(
    job: dict[str, Any],
    folder: Path,
    num_processes: int,
    max_restarts: int,
    stop: StopRequest,
    print_lines: bool,
) -> dict[str, Any]:
    """Run the job until it ends well, starting it again after crashes; return its report."""
    checkpoints = Path(job["output"])
    with progress("training") as show_progress:
        show_iteration = follow(Path(job["metrics"]), job["config"]["train"]["train_iters"], show_progress)

        def on_tick() -> None:
            stop.check()
            show_iteration()

        def start(name: str) -> dict[str, Any]:
            try:
                return launch(
                    "training.pretrain",
                    job,
                    folder=folder / name,
                    num_processes=num_processes,
                    grace=stop.grace,
                    on_line=print if print_lines and not person_watches() else None,
                    on_tick=on_tick,
                )
            except JobStoppedError:
                return stop.outcome(folder / name, checkpoints)

        return run_with_restarts(
            start,
            checkpoints=checkpoints,
            folder=folder,
            max_restarts=max_restarts,
            log=lambda line: print(line, file=sys.stderr),
        )


def show(job: dict[str, Any], report: dict[str, Any], parallel: ParallelSpec, as_json: bool) -> None:
    """Print where the run lies and how it ended."""
    summary = {
        "checkpoints": job["output"],
        "metrics": job["metrics"],
        **report,
        "attempts": len(report["attempts"]),
        **losses(Path(job["metrics"])),
    }
    if as_json:
        print_json({**summary, "parallel": with_ranks(parallel)})
    else:
        # a run that was complete already has no loss of its own
        rows = [(name, value) for name, value in summary.items() if value is not None]
        print_table(("what", "value"), rows)


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
