"""Measures how fast a config trains: `python -m training.benchmark SHAPE [section.field=value ...]`.

SHAPE names a function that returns a config, such as `recipes.llama:llama3_8b_pretrain_config`.
Works as a single process and under torchrun, with a GPU and without; on random tokens, without checkpoints.
Prints a table, and on the last line one JSON object.
"""

import argparse
import dataclasses
import json
import pkgutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bridge import distributed
from bridge.errors import BridgeworksError, ConfigError
from training import gpt_step
from training.callbacks import Callback, GarbageCollection, MetricsLog, Step, StopOnSignal, metrics_of
from training.config import ConfigContainer
from training.overrides import apply_overrides
from training.parallel_plan import Layout
from training.pretrain import prepare, train
from training.profiling import window_callbacks
from training.setup import Run, iterators, set_up
from training.throughput import measure_peak, summary

EXAMPLE = "recipes.llama:llama3_8b_pretrain_config"
SHORTCUTS = {
    "layers": "model.num_layers",
    "seq-length": "model.seq_length",
    "micro-batch-size": "train.micro_batch_size",
    "global-batch-size": "train.global_batch_size",
    "precision": "mixed_precision",
    "tensor": "model.tensor_model_parallel_size",
    "pipeline": "model.pipeline_model_parallel_size",
    "context": "model.context_parallel_size",
    "expert": "model.expert_model_parallel_size",
}


@dataclasses.dataclass
class RandomTokens(torch.utils.data.Dataset):
    """Sequences of tokens drawn by their number, the same for every run."""

    size: int
    seq_length: int
    vocab_size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator(device="cpu").manual_seed(number)
        tokens = torch.randint(self.vocab_size, (self.seq_length + 1,), generator=generator, device="cpu")
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self.seq_length, device="cpu"),
            "position_ids": torch.arange(self.seq_length, device="cpu"),
        }


class Lines(Callback):
    """Keeps the metrics of every iteration, and when each ended."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.ends: list[float] = []

    def before_training(self, run: Run) -> None:
        self.ends.append(time.time())

    def after_step(self, run: Run, step: Step) -> None:
        self.lines.append(metrics_of(run, step))
        self.ends.append(time.time())


def main() -> None:
    """Measure and print; every rank takes part."""
    options, assignments = arguments(sys.argv[1:])
    try:
        config = configure(options, assignments)
        result = measure(config, options.warmup, peak=options.peak)
    except BridgeworksError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if torch.distributed.get_rank() == 0:
        show(result)
        print(json.dumps(result), flush=True)
    distributed.finalize()


def arguments(values: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m training.benchmark", description=__doc__)
    parser.add_argument("shape", help="module:function that returns a config")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--steps", type=int, default=10, help="iterations to measure")
    parser.add_argument("--warmup", type=int, default=3, help="iterations before them")
    parser.add_argument("--peak", action="store_true", help="measure the GPU's bf16 matrix product first")
    parser.add_argument("--profile", help="folder for torch's profile of the last iteration")
    for name, field in SHORTCUTS.items():
        parser.add_argument(f"--{name}", metavar="VALUE", help=f"the same as {field}=VALUE")
    options = parser.parse_intermixed_args(values)
    given = {field: getattr(options, name.replace("-", "_")) for name, field in SHORTCUTS.items()}
    shortcuts = [f"{field}={value}" for field, value in given.items() if value is not None]
    return options, [*shortcuts, *options.overrides]


def configure(options: argparse.Namespace, assignments: list[str]) -> ConfigContainer:
    """Return the shape's config, in one copy of the model unless told otherwise, for the steps to run."""
    for name, least in (("steps", 1), ("warmup", 0)):
        if (value := getattr(options, name)) < least:
            raise ConfigError(f"--{name} is {value}: give {least} or more")
    config = Layout().apply(shape_named(options.shape))
    config.train.train_iters = options.warmup + options.steps
    config.train.eval_interval = None
    config.scheduler.lr_warmup_iters = 0
    apply_overrides(config, assignments)
    if options.profile:
        config.profiling.use_pytorch_profiler = True
        config.profiling.output = options.profile
        config.profiling.profile_step_start = config.train.train_iters
        config.profiling.profile_step_end = config.train.train_iters + 1
    return config


def shape_named(name: str) -> ConfigContainer:
    """Call the function with this name, such as module:function; one that is not there is a ConfigError."""
    try:
        shape = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name} names no function: {error}; give one as {EXAMPLE}") from error
    if not callable(shape) or not isinstance(config := shape(), ConfigContainer):
        raise ConfigError(f"{name} is no function that returns a config: give one as {EXAMPLE}")
    return config


def measure(config: ConfigContainer, warmup: int, *, peak: bool = False) -> dict[str, Any]:
    """Train; return medians over the iterations after `warmup`, and the times of start and loop."""
    prepare(config)
    run = set_up(config, gpt_step.forward_step)
    peak_tflops = measure_peak() if peak else config.logger.peak_tflops
    config.logger.peak_tflops = peak_tflops
    model, samples = config.model, config.train.train_iters * config.train.global_batch_size
    data = iterators(run, RandomTokens(samples, model.seq_length, model.vocab_size), 0)
    kept = Lines()
    with tempfile.TemporaryDirectory() as folder:
        config.logger.metrics_path = config.logger.metrics_path or str(Path(folder) / "metrics.jsonl")
        usual = [GarbageCollection(), MetricsLog(), StopOnSignal(), *window_callbacks(config.profiling)]
        train(run, data, [*usual, kept])
    return {
        "gpus": torch.distributed.get_world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **measured(kept, warmup),
        **({"peak_tflops": peak_tflops} if peak_tflops else {}),
        "losses": [line["loss"] for line in kept.lines],
    }


def measured(kept: Lines, warmup: int) -> dict[str, float]:
    """Return the medians of what was kept; `loop_share` is what an iteration takes besides its step."""
    lines = kept.lines[warmup:]
    wall = kept.ends[-1] - kept.ends[warmup]
    steps = sum(line["seconds"] for line in lines)
    return {
        **summary(lines),
        "loop_share": 1 - steps / wall,
        "seconds_to_first_step": kept.ends[1] - psutil.Process().create_time(),
    }


def show(result: dict[str, Any]) -> None:
    """Print the numbers as a table."""
    table = Table(title=f"{result['gpus']} x {result['device']}")
    table.add_column("measured")
    table.add_column("median", justify="right")
    for name, value in result.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4g}" if value < 1e4 else f"{value:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
