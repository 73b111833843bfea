"""Everything that a run consists of, built from its config: model, optimizer, schedule and data."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from bridge import distributed, model
from training import data
from training.config import ConfigContainer
from training.faults import Faults, RefusableOptimizer
from training.heartbeat import Heart
from training.megatron_settings import ddp_settings, optimizer_settings, transformer_settings
from training.run_metrics import RunMetrics
from training.stopwatch import Stopwatch
from training.user_buffers import start_user_buffers

ForwardStep = Callable[[Iterator[data.Batch], torch.nn.Module], tuple[torch.Tensor, Callable]]


@dataclass
class Run:
    """A run in progress: its parts, and how far it has come."""

    config: ConfigContainer
    forward_step: ForwardStep
    model: list[Any]
    optimizer: RefusableOptimizer
    scheduler: OptimizerParamScheduler
    faults: Faults
    iteration: int = 0
    consumed_samples: int = 0
    # the checkpoint that the weights came from: it describes the model and has the files that go with it
    source: Path | None = None
    should_stop: bool = False
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    heart: Heart = field(default_factory=Heart)
    metrics: RunMetrics = field(default_factory=RunMetrics)

    @property
    def is_first_rank(self) -> bool:
        return torch.distributed.get_rank() == 0


def set_up(config: ConfigContainer, forward_step: ForwardStep) -> Run:
    """Make this process a rank of the run that `config` describes, at its iteration 0."""
    # it warns at every start that it is off
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    set_determinism(config)
    distributed.initialize(config.model)
    # also where this process has built a model or trained before
    distributed.seed_generators(config.rng.seed)
    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        rank=torch.distributed.get_rank(),
        rampup_batch_size=None,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    start_user_buffers(config)
    chunks = build_model(config)
    optimizer = build_optimizer(config, chunks)
    scheduler = build_scheduler(config, optimizer)
    return Run(config, forward_step, chunks, optimizer, scheduler, Faults(config.resilience))


def compute_capability() -> tuple[int, int] | None:
    """Return that of this rank's GPU, or None without one."""
    return torch.cuda.get_device_capability(distributed.device()) if torch.cuda.is_available() else None


def set_determinism(config: ConfigContainer) -> None:
    """Let torch use only operations that give the same bits every time, if the config says so."""
    if config.train.deterministic_mode is None:
        config.train.deterministic_mode = not torch.cuda.is_available()
    if config.train.deterministic_mode:
        # read by cuBLAS, NCCL and Transformer Engine when they start
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def build_model(config: ConfigContainer) -> list[Any]:
    """Build this rank's model chunks, wrapped in Megatron's data parallelism."""
    settings = transformer_settings(config)
    stages = config.model.virtual_pipeline_model_parallel_size
    chunks = [
        model.on_device(model.provide(config.model, vp_stage=stage, config=settings), settings)
        for stage in (range(stages) if stages else [None])
    ]
    wrapped = model.wrap(chunks, settings, ddp_settings(config))
    if config.ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        settings.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


@contextmanager
def whole_parameters(run: Run) -> Iterator[None]:
    """Give every rank all of its parameters, some of which an overlapped gather leaves to the next pass."""
    chunks = run.model if run.config.ddp.overlap_param_gather else []
    for chunk in chunks:
        chunk.disable_forward_pre_hook()
    yield
    for chunk in chunks:
        chunk.enable_forward_pre_hook()


def build_optimizer(config: ConfigContainer, chunks: list[Any]) -> RefusableOptimizer:
    """Build Megatron's distributed Adam."""
    built = get_megatron_optimizer(optimizer_settings(config), chunks)
    optimizer = RefusableOptimizer(built.chained_optimizers)
    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def build_scheduler(config: ConfigContainer, optimizer: RefusableOptimizer) -> OptimizerParamScheduler:
    """Build Megatron's schedule, which counts in samples."""
    scheduler, samples = config.scheduler, config.train.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=scheduler.lr_warmup_init,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=scheduler.lr_warmup_iters * samples,
        lr_decay_steps=(scheduler.lr_decay_iters or config.train.train_iters) * samples,
        lr_decay_style=scheduler.lr_decay_style,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=config.train.train_iters * samples,
        wd_incr_style="constant",
        # a resumed run follows its config, the only place that says how it should go on
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=(scheduler.lr_wsd_decay_iters or 0) * samples,
        lr_wsd_decay_style=scheduler.lr_wsd_decay_style,
    )


def build_data(run: Run) -> dict[str, Any]:
    """Build the datasets of the run: what it trains on, and what it validates with if it does.

    The run has been loaded: what it has read so far may have been in batches of another size.
    """
    train = run.config.train
    remaining = max(0, train.train_iters - run.iteration) * train.global_batch_size
    sizes: dict[str, int | None] = {"train": run.consumed_samples + remaining}
    if train.eval_interval is not None:
        sizes["valid"] = train.eval_iters * train.global_batch_size
    provider, dataset = run.config.model, run.config.dataset
    if dataset.mock and not (dataset.blend or dataset.blend_per_split):
        vocab_size = run.config.tokenizer.vocab_size or provider.vocab_size
        return data.build_mock_datasets(dataset, sizes, provider.seq_length, vocab_size)
    return data.build_datasets(dataset, sizes, provider.seq_length, provider.vocab_size)


def iterators(run: Run, dataset: Any, consumed_samples: int) -> list[Iterator[data.Batch]]:
    """Return one iterator over the same micro-batches for each of this rank's model chunks."""
    return [
        data.batches(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=run.config.train.micro_batch_size,
            num_workers=run.config.dataset.num_workers,
        )
        for _ in run.model
    ]
