"""Measures how long saving stops a run: `python -m training.benchmark_checkpoints SHAPE [...]`.

SHAPE and overrides are those of training.benchmark. Each round saves once with training waiting and once
beside it. Prints a table, and on the last line one JSON object.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bridge import distributed
from bridge.errors import BridgeworksError
from training import gpt_step
from training.benchmark import RandomTokens, arguments, configure, show
from training.checkpoint_saving import Saver
from training.config import ConfigContainer
from training.data import Batch
from training.pretrain import prepare, train_step
from training.setup import Run, iterators, set_up

Seconds = dict[str, list[float]]


def main() -> None:
    """Measure and print; the folder is `checkpoint.save`, else a temporary one."""
    options, assignments = arguments(sys.argv[1:])
    try:
        result = measure(configure(options, assignments), options)
    except BridgeworksError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if torch.distributed.get_rank() == 0:
        show(result)
        print(json.dumps(result), flush=True)
    distributed.finalize()


def measure(config: ConfigContainer, options: argparse.Namespace) -> dict[str, Any]:
    """Return medians in seconds: of saves, their stalls, iterations with and without a writer beside."""
    config.train.train_iters = 1 << 20
    config.dataset.mock = True
    prepare(config)
    run = set_up(config, gpt_step.forward_step)
    model = config.model
    data = iterators(run, RandomTokens(1 << 20, model.seq_length, model.vocab_size), 0)
    for _ in range(options.warmup):
        train_step(run, data)
    with shared_folder(config) as folder:
        config.checkpoint.save = str(folder)
        config.checkpoint.most_recent_k = 1
        seconds = rounds(run, data, options.steps)
        size = sum(file.stat().st_size for file in folder.rglob("*.distcp"))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "gpus": torch.distributed.get_world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "gigabytes": size / 1e9,
        **medians,
        "stall_share": medians["stall"] / medians["synchronous"],
    }


class shared_folder:  # noqa: N801 (a context manager, used as a function)
    """The folder for checkpoints, the same on all ranks; a temporary one is removed at the end."""

    def __init__(self, config: ConfigContainer) -> None:
        self._given = config.checkpoint.save

    def __enter__(self) -> Path:
        choice = [self._given or tempfile.mkdtemp(prefix="checkpoints-")]
        torch.distributed.broadcast_object_list(choice, src=0)
        self._folder = Path(choice[0])
        return self._folder

    def __exit__(self, *error: object) -> None:
        torch.distributed.barrier()
        if self._given is None:
            shutil.rmtree(self._folder, ignore_errors=True)


def rounds(run: Run, data: list[Iterator[Batch]], number: int) -> Seconds:
    """Save in both ways, so many times after a first one that does not count."""
    saver = Saver()
    seconds: Seconds = {"iteration": [], "synchronous": [], "iteration_beside": [], "stall": []}
    for _ in range(number + 1):
        measured = {**save_waiting(run, data, saver), **save_beside(run, data, saver)}
        for name, value in measured.items():
            seconds[name].append(value)
    saver.wait_for_removal()
    return {name: values[1:] for name, values in seconds.items()}


def save_waiting(run: Run, data: list[Iterator[Batch]], saver: Saver) -> dict[str, float]:
    iteration = timed(lambda: train_step(run, data))
    return {
        "iteration": iteration,
        "synchronous": timed(lambda: saver.begin(run)) + timed(lambda: saver.finish(run)),
    }


def save_beside(run: Run, data: list[Iterator[Batch]], saver: Saver) -> dict[str, float]:
    """Train until a checkpoint that was begun is complete; the stall is all but the iterations."""
    train_step(run, data)
    stall, steps = timed(lambda: saver.begin(run)), []
    while saver.is_pending:
        steps.append(timed(lambda: train_step(run, data)))
        stall += timed(lambda: saver.poll(run))
    return {"stall": stall, "iteration_beside": statistics.median(steps)}


def timed(action: Callable[[], Any]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
