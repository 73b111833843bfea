"""Contradictions in a config, found before any process starts; every one is a ConfigError."""

import math
from typing import TYPE_CHECKING

from bridge.errors import ConfigError
from training import blend

if TYPE_CHECKING:
    from training.config import ConfigContainer, OptimizerConfig

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
FAULT_POLICIES = {"on_nan": ("stop", "skip"), "on_spike": ("stop", "skip", "ignore")}
OPTIMIZER_DTYPES = {
    "main_grads_dtype": ("float32", "bfloat16"),
    "main_params_dtype": ("float32", "float16"),
    "exp_avg_dtype": ("float32", "float16", "bfloat16", "uint8"),
    "exp_avg_sq_dtype": ("float32", "float16", "bfloat16", "uint8"),
}


def check(config: "ConfigContainer", num_microbatches: int) -> None:
    """Check what does not concern one field alone; `num_microbatches` are those of one rank's iteration."""
    check_counts(config)
    check_schedule(config)
    check_data(config)
    check_sequence(config)
    check_interleaving(config, num_microbatches)
    check_experts(config)
    check_optimizer(config)
    check_overlap(config)
    check_recomputation(config)
    check_profiling(config)
    check_resilience(config)
    check_exports(config)


def check_counts(config: "ConfigContainer") -> None:
    for name in ("train_iters", "micro_batch_size", "global_batch_size", "eval_iters", "manual_gc_interval"):
        if getattr(config.train, name) < 1:
            raise ConfigError(f"train.{name} is {getattr(config.train, name)}: give 1 or more")
    for name, interval in (
        ("train.eval_interval", config.train.eval_interval),
        ("checkpoint.save_interval", config.checkpoint.save_interval),
        ("checkpoint.most_recent_k", config.checkpoint.most_recent_k),
        ("checkpoint.export_interval", config.checkpoint.export_interval),
        ("checkpoint.export_most_recent_k", config.checkpoint.export_most_recent_k),
        ("logger.log_interval", config.logger.log_interval),
    ):
        if interval is not None and interval < 1:
            raise ConfigError(f"{name} is {interval}: give 1 or more, or null")


def check_schedule(config: "ConfigContainer") -> None:
    style, scheduler = config.scheduler.lr_decay_style, config.scheduler
    if style not in LR_DECAY_STYLES:
        raise ConfigError(f"scheduler.lr_decay_style is {style!r}: allowed are {', '.join(LR_DECAY_STYLES)}")
    if style == "WSD" and scheduler.lr_wsd_decay_iters is None:
        raise ConfigError("scheduler.lr_decay_style WSD needs scheduler.lr_wsd_decay_iters")
    decay_iters = scheduler.lr_decay_iters or config.train.train_iters
    if not 0 <= scheduler.lr_warmup_iters < decay_iters:
        raise ConfigError(
            f"scheduler.lr_warmup_iters is {scheduler.lr_warmup_iters}: give 0 to {decay_iters - 1},"
            f" less than the {decay_iters} iterations of the decay"
        )
    if not 0 <= config.optimizer.min_lr <= config.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr is {config.optimizer.min_lr}: give 0 to optimizer.lr = {config.optimizer.lr}"
        )


def check_data(config: "ConfigContainer") -> None:
    blend.check_settings(config.dataset)


def check_sequence(config: "ConfigContainer") -> None:
    """Megatron gives every context-parallel rank two parts of a sequence: equal work under a causal mask."""
    model = config.model
    context = model.context_parallel_size
    parts = 2 * context if context > 1 else 1
    if model.sequence_parallel:
        parts = math.lcm(parts, context * model.tensor_model_parallel_size)
    if model.seq_length % parts:
        raise ConfigError(
            f"model.seq_length {model.seq_length} cannot be shared out with context_parallel_size {context}"
            f" and tensor_model_parallel_size {model.tensor_model_parallel_size}: give a multiple of {parts}"
        )


def check_interleaving(config: "ConfigContainer", num_microbatches: int) -> None:
    pipeline = config.model.pipeline_model_parallel_size
    if config.model.virtual_pipeline_model_parallel_size and num_microbatches % pipeline:
        raise ConfigError(
            f"an interleaved pipeline of {pipeline} stages cannot run {num_microbatches} microbatches:"
            f" change train.global_batch_size so that their number is a multiple of {pipeline}"
        )


def check_experts(config: "ConfigContainer") -> None:
    model = config.model
    if model.num_moe_experts and model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        raise ConfigError(
            f"model.tensor_model_parallel_size {model.tensor_model_parallel_size} with experts trains with"
            " sequence parallelism only: set model.sequence_parallel to true"
        )


def check_optimizer(config: "ConfigContainer") -> None:
    optimizer = config.optimizer
    for name, allowed in OPTIMIZER_DTYPES.items():
        value = getattr(optimizer, name)
        if value not in allowed:
            raise ConfigError(f"optimizer.{name} is {value!r}: allowed are {', '.join(allowed)}")
        if value != "float32" and not optimizer.use_precision_aware_optimizer:
            raise ConfigError(f"optimizer.{name} {value} needs optimizer.use_precision_aware_optimizer")
    if optimizer.optimizer_cpu_offload:
        check_optimizer_offload(optimizer)


def check_optimizer_offload(optimizer: "OptimizerConfig") -> None:
    fraction = optimizer.optimizer_offload_fraction
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"optimizer.optimizer_offload_fraction is {fraction}: give more than 0 and at most 1"
        )
    # Megatron Core's HybridDeviceOptimizer has no checkpoint without it, and computes in fp32
    if not optimizer.use_precision_aware_optimizer:
        raise ConfigError(
            "optimizer.optimizer_cpu_offload needs optimizer.use_precision_aware_optimizer: set it to true"
        )
    for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(optimizer, name) != "float32":
            raise ConfigError(
                f"optimizer.optimizer_cpu_offload keeps the optimizer in float32: leave out optimizer.{name}"
            )


def check_overlap(config: "ConfigContainer") -> None:
    overlap, model = config.comm_overlap, config.model
    if overlap.tp_comm_overlap and not model.sequence_parallel:
        raise ConfigError(
            "comm_overlap.tp_comm_overlap hides the messages of sequence parallelism: set"
            " model.sequence_parallel and tensor_model_parallel_size > 1, or leave it off"
        )
    if overlap.defer_embedding_wgrad_compute and model.pipeline_model_parallel_size == 1:
        raise ConfigError("comm_overlap.defer_embedding_wgrad_compute needs pipeline_model_parallel_size > 1")
    if overlap.overlap_moe_expert_parallel_comm and model.expert_model_parallel_size == 1:
        raise ConfigError(
            "comm_overlap.overlap_moe_expert_parallel_comm needs model.expert_model_parallel_size > 1"
        )
    if overlap.delay_wgrad_compute and not overlap.overlap_moe_expert_parallel_comm:
        raise ConfigError("comm_overlap.delay_wgrad_compute needs overlap_moe_expert_parallel_comm")
    if config.ddp.overlap_param_gather and not config.ddp.overlap_grad_reduce:
        raise ConfigError("ddp.overlap_param_gather needs ddp.overlap_grad_reduce")


def check_recomputation(config: "ConfigContainer") -> None:
    model = config.model
    if model.recompute_modules and model.recompute_granularity != "selective":
        raise ConfigError("model.recompute_modules needs model.recompute_granularity selective")
    if model.recompute_granularity == "full" and not (model.recompute_method and model.recompute_num_layers):
        raise ConfigError(
            "model.recompute_granularity full needs model.recompute_method (uniform or block) and"
            " model.recompute_num_layers"
        )
    if model.cpu_offloading and (model.recompute_granularity or model.pipeline_model_parallel_size > 1):
        raise ConfigError("model.cpu_offloading goes neither with recomputation nor with pipeline stages")
    if model.cpu_offloading and not 0 < model.cpu_offloading_num_layers < model.num_layers:
        raise ConfigError(
            f"model.cpu_offloading_num_layers is {model.cpu_offloading_num_layers}: give 1 to"
            f" {model.num_layers - 1}"
        )


def check_profiling(config: "ConfigContainer") -> None:
    profiling = config.profiling
    if not 0 < profiling.profile_step_start < profiling.profile_step_end:
        raise ConfigError(
            f"profiling looks at iterations {profiling.profile_step_start} to {profiling.profile_step_end}:"
            " give a start of 1 or more and an end after it"
        )
    if (profiling.use_pytorch_profiler or profiling.record_memory_history) and profiling.output is None:
        raise ConfigError("profiling.output is null: name the folder for what the profiler finds")


def check_exports(config: "ConfigContainer") -> None:
    checkpoint = config.checkpoint
    if checkpoint.export_interval is None:
        return
    if checkpoint.export_hf is None:
        raise ConfigError("checkpoint.export_interval needs checkpoint.export_hf, a folder for the exports")
    if checkpoint.save_interval is None or checkpoint.export_interval % checkpoint.save_interval:
        raise ConfigError(
            f"checkpoint.export_interval is {checkpoint.export_interval}: give a multiple of"
            f" checkpoint.save_interval, which is {checkpoint.save_interval}"
        )


def check_resilience(config: "ConfigContainer") -> None:
    resilience = config.resilience
    for name, allowed in FAULT_POLICIES.items():
        value = getattr(resilience, name)
        if value not in allowed:
            raise ConfigError(f"resilience.{name} is {value!r}: allowed are {', '.join(allowed)}")
    for name, least in (("spike_window", 1), ("spike_warmup_iters", 1), ("max_skipped", 0)):
        if getattr(resilience, name) < least:
            raise ConfigError(f"resilience.{name} is {getattr(resilience, name)}: give {least} or more")
    if resilience.spike_factor <= 1:
        raise ConfigError(f"resilience.spike_factor is {resilience.spike_factor}: give more than 1")
    if resilience.hang_timeout is not None and resilience.hang_timeout < 1:
        raise ConfigError(
            f"resilience.hang_timeout is {resilience.hang_timeout}: give 1 second or more, or null"
        )
    if resilience.on_nan == "skip" and config.ddp.check_for_nan_in_grad:
        raise ConfigError(
            "resilience.on_nan skip leaves gradients out that are no numbers, but ddp.check_for_nan_in_grad"
            " ends the job at the first: set one of them to its default"
        )
