"""The training loop, and the job that runs it.

A run that finds complete checkpoints of its own goes on from the last one. What happens around the loop is in
callbacks.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

from bridge import distributed
from bridge.errors import ConfigError
from bridge.job import EXIT_STOPPED, write_json
from training import checkpoint, gpt_step
from training.callbacks import (
    Callback,
    GarbageCollection,
    MetricsLog,
    Step,
    StopOnSignal,
    Validation,
)
from training.checkpoint_callback import Checkpoints
from training.config import CheckpointConfig, ConfigContainer
from training.data import SAMPLE_INDICES, Batch
from training.faults import update
from training.hang_watch import HangWatch
from training.heartbeat import BATCH, OPTIMIZER, BeatingData
from training.pipeline import run_batch, sums_of_all_ranks
from training.profiling import window_callbacks
from training.run_lock import sole_run
from training.setup import ForwardStep, Run, build_data, compute_capability, iterators, set_up
from training.side_losses import side_losses
from training.stopwatch import TimedData, timed_forward

PLACES = {  # of a job, and where the config has them
    "output": "checkpoint.save",
    "load": "checkpoint.pretrained_checkpoint",
    "metrics": "logger.metrics_path",
}


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Run the job: train as `config["config"]` says, from the weights in "load", into the folder "output".

    A run that was told to stop saves and exits with EXIT_STOPPED; its report says so too.
    """
    container = ConfigContainer.from_dict(config["config"])
    take_places(container, config)
    report = pretrain(container, gpt_step.forward_step, report=Path(config["report"]))
    distributed.finalize()
    if report["stopped"]:
        if os.environ.get("RANK", "0") == "0":
            write_json(Path(config["report"]), report)
        sys.exit(EXIT_STOPPED)
    return report


def take_places(config: ConfigContainer, job: dict[str, Any]) -> None:
    """Put the places that the job names into the config, which may name no others."""
    for key, name in PLACES.items():
        section, _, field = name.partition(".")
        given, found = job.get(key), getattr(getattr(config, section), field)
        if found not in (None, given):
            raise ConfigError(
                f"{name} is {found} in the job's config, and its {key!r} is {given}: leave one out"
            )
        setattr(getattr(config, section), field, given)


def pretrain(
    config: ConfigContainer, forward_step: ForwardStep = gpt_step.forward_step, report: Path | None = None
) -> dict[str, Any]:
    """Train until `train_iters` or SIGTERM, in every rank of a torchrun job; return how it ended.

    With `report`, the file for a hang's error, the job is ended when it hangs.
    """
    started = time.monotonic()
    check_saving(config.checkpoint)
    prepare(config)
    run = set_up(config, forward_step)
    with sole_run(config.checkpoint.save):
        loss = load_and_train(run, report)
    stopped = run.iteration < config.train.train_iters
    return {
        "iteration": run.iteration,
        "train_iters": config.train.train_iters,
        "consumed_samples": run.consumed_samples,
        "loss": loss,
        "stopped": stopped,
        "stop_reason": "told to stop" if stopped else "all iterations done",
        "skipped_iterations": run.faults.skipped,
        "spikes": run.faults.spikes,
        "seconds": time.monotonic() - started,
    }


def load_and_train(run: Run, report: Path | None) -> float | None:
    checkpoint.start_or_resume(run)
    datasets = build_data(run)
    data_iterators = iterators(run, datasets["train"], run.consumed_samples)
    timeout = run.config.resilience.hang_timeout
    with HangWatch(run.heart, timeout, report) if report and timeout else nullcontext():
        return train(run, data_iterators, callbacks_of(run, datasets))


def prepare(config: ConfigContainer) -> None:
    """Check the config before any process group exists, and fill what follows from this job."""
    started = torch.distributed.is_initialized()
    config.validate(torch.distributed.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1")))
    config.mixed_precision.check_device(compute_capability())
    config.profiling.check_device(torch.cuda.is_available())
    if config.dataset.path_to_cache is None and config.checkpoint.save is not None:
        config.dataset.path_to_cache = str(Path(config.checkpoint.save) / SAMPLE_INDICES)


def check_saving(checkpoint: CheckpointConfig) -> None:
    """Refuse to ask for checkpoints, or their exports, without a place for them."""
    for name in ("save_interval", "export_hf"):
        if getattr(checkpoint, name) is not None and checkpoint.save is None:
            raise ConfigError(f"checkpoint.{name} needs checkpoint.save, the folder of the checkpoints")


def callbacks_of(run: Run, datasets: dict[str, Any]) -> list[Callback]:
    """Return what the config asks to happen around the iterations, in this order but at their end."""
    config = run.config
    return [
        *([GarbageCollection()] if config.train.manual_gc else []),
        MetricsLog(),
        *([Validation(datasets["valid"])] if "valid" in datasets else []),
        *window_callbacks(config.profiling),
        StopOnSignal(),
        Checkpoints(),
    ]


def train(run: Run, data_iterators: list[Iterator[Batch]], callbacks: Sequence[Callback]) -> float | None:
    """Run the iterations that remain; return the last one's loss."""
    try:
        return run_iterations(run, data_iterators, callbacks)
    except BaseException:
        for callback in callbacks:
            callback.after_failure(run)
        raise


def run_iterations(
    run: Run, data_iterators: list[Iterator[Batch]], callbacks: Sequence[Callback]
) -> float | None:
    loss = None
    for callback in callbacks:
        callback.before_training(run)
    while run.iteration < run.config.train.train_iters and not run.should_stop:
        step = train_step(run, data_iterators)
        for callback in callbacks:
            run.heart.beat(type(callback).__name__, limited=not callback.takes_long)
            callback.after_step(run, step)
        loss = loss if step.is_skipped else step.loss
        run.heart.is_warm = True
    for callback in reversed(callbacks):  # the last checkpoint has numbers to write, and SIGTERM waits for it
        run.heart.beat(type(callback).__name__, limited=not callback.takes_long)
        callback.after_training(run)
    return loss


def train_step(run: Run, data_iterators: list[Iterator[Batch]]) -> Step:
    """Run one iteration: the gradients of a global batch, one update, one step of the schedule.

    The host waits for the GPU when the update asks for loss and gradient norm, and once more at the end.
    """
    started = time.monotonic()
    run.heart.iteration = run.iteration + 1
    run.heart.beat(BATCH)
    zero_gradients(run)
    with run.stopwatch.span("batch"):
        results = run_batch(
            timed_forward(run.forward_step, run.stopwatch),
            run.model,
            [TimedData(BeatingData(batches, run.heart), run.stopwatch) for batches in data_iterators],
            num_microbatches=get_num_microbatches(),
            micro_batch_size=run.config.train.micro_batch_size,
            seq_length=run.config.model.seq_length,
            forward_only=False,
        )
        sums = sums_of_all_ranks(results)
    learning_rate = run.optimizer.param_groups[0]["lr"]
    run.heart.beat(OPTIMIZER)
    with run.stopwatch.span("optimizer"):
        outcome = update(run, results, sums)
    if outcome.updated:  # not when fp16 gradients overflowed, which lowers the loss scale, or it was skipped
        run.scheduler.step(increment=run.config.train.global_batch_size)
    run.iteration += 1
    run.consumed_samples += run.config.train.global_batch_size
    spans = run.stopwatch.read()
    beside = side_losses(run.config.model, get_num_microbatches())
    return Step(
        loss=outcome.loss,
        learning_rate=learning_rate,
        grad_norm=outcome.grad_norm,
        fault=outcome.fault,
        seconds=time.monotonic() - started,
        spans=spans,
        side_losses=beside,
    )


def zero_gradients(run: Run) -> None:
    for chunk in run.model:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
