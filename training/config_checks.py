"""Contradictions in a config, found before any process starts; every one is a ConfigError."""

import math
from typing import TYPE_CHECKING

from bridge.errors import ConfigError
from training import blend
from training.config_paths import check_paths

if TYPE_CHECKING:
    from bridge.provider import GPTModelProvider
    from training.config import ConfigContainer, OptimizerConfig

OPTIMIZER_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
SHAPES = (  # of the tensors that a checkpoint has
    *(
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
    ),
    *("vocab_size", "gated_linear_unit", "add_bias_linear", "add_qkv_bias", "qk_layernorm"),
    *("num_moe_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "v_head_dim"),
    "share_embeddings_and_output_weights",
)


def check(config: "ConfigContainer", num_microbatches: int) -> None:
    """Check what does not concern one field alone; `num_microbatches` are those of one rank's iteration."""
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
    check_paths(config)


def check_schedule(config: "ConfigContainer") -> None:
    scheduler, optimizer = config.scheduler, config.optimizer
    decay_iters = scheduler.lr_decay_iters or config.train.train_iters
    if scheduler.lr_warmup_iters >= decay_iters:
        raise ConfigError(
            f"scheduler.lr_warmup_iters is {scheduler.lr_warmup_iters}: give 0 to {decay_iters - 1},"
            f" less than the {decay_iters} iterations of the decay"
        )
    for name, rate in (
        ("optimizer.min_lr", optimizer.min_lr),
        ("scheduler.lr_warmup_init", scheduler.lr_warmup_init),
    ):
        if rate > optimizer.lr:
            raise ConfigError(f"{name} is {rate}: give 0 to optimizer.lr = {optimizer.lr}")
    if scheduler.lr_decay_style == "WSD":
        if scheduler.lr_wsd_decay_iters is None:
            raise ConfigError("scheduler.lr_decay_style WSD needs scheduler.lr_wsd_decay_iters")
        if scheduler.lr_wsd_decay_iters > decay_iters:
            raise ConfigError(
                f"scheduler.lr_wsd_decay_iters is {scheduler.lr_wsd_decay_iters}: give at most the"
                f" {decay_iters} iterations of the decay"
            )
    elif scheduler.lr_wsd_decay_iters is not None:
        raise ConfigError(
            f"scheduler.lr_wsd_decay_iters is for scheduler.lr_decay_style WSD, not"
            f" {scheduler.lr_decay_style}: leave it out"
        )
    if scheduler.lr_warmup_init and not scheduler.lr_warmup_iters:
        raise ConfigError("scheduler.lr_warmup_init is for a warm-up: give scheduler.lr_warmup_iters too")


def check_data(config: "ConfigContainer") -> None:
    blend.check_settings(config.dataset)
    asked, known = config.tokenizer.vocab_size, config.model.vocab_size
    if asked is not None and asked > known:
        raise ConfigError(
            f"tokenizer.vocab_size is {asked}: give at most the model's {known}, or leave it out"
        )


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
    if (
        model.num_moe_experts
        and model.moe_router_load_balancing_type == "sinkhorn"
        and model.moe_aux_loss_coeff
    ):
        raise ConfigError(
            "model.moe_router_load_balancing_type sinkhorn balances without a loss: set"
            " model.moe_aux_loss_coeff to 0"
        )
    sent = model.tensor_model_parallel_size * model.expert_model_parallel_size > 1
    if model.num_moe_experts and model.moe_token_dispatcher_type == "flex" and not sent:
        raise ConfigError(
            "model.moe_token_dispatcher_type flex sends tokens between ranks: choose a tensor or expert"
            " parallel size above 1, or alltoall"
        )


def check_optimizer(config: "ConfigContainer") -> None:
    optimizer = config.optimizer
    for name in OPTIMIZER_DTYPES:
        value = getattr(optimizer, name)
        if value != "float32" and not optimizer.use_precision_aware_optimizer:
            raise ConfigError(f"optimizer.{name} {value} needs optimizer.use_precision_aware_optimizer")
    if optimizer.optimizer_cpu_offload:
        check_optimizer_offload(optimizer)


def check_optimizer_offload(optimizer: "OptimizerConfig") -> None:
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
    if config.ddp.overlap_param_gather and not config.ddp.overlap_grad_reduce:
        raise ConfigError("ddp.overlap_param_gather needs ddp.overlap_grad_reduce")


def check_recomputation(config: "ConfigContainer") -> None:
    model = config.model
    if model.recompute_modules and model.recompute_granularity != "selective":
        raise ConfigError("model.recompute_modules needs model.recompute_granularity selective")
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(model, name) is not None and model.recompute_granularity != "full":
            raise ConfigError(f"model.{name} needs model.recompute_granularity full")
    if model.recompute_granularity == "full" and not (model.recompute_method and model.recompute_num_layers):
        raise ConfigError(
            "model.recompute_granularity full needs model.recompute_method (uniform or block) and"
            " model.recompute_num_layers"
        )
    if (model.recompute_num_layers or 0) > model.num_layers:
        raise ConfigError(
            f"model.recompute_num_layers is {model.recompute_num_layers}: the model has {model.num_layers}"
        )
    if model.cpu_offloading and (model.recompute_granularity or model.pipeline_model_parallel_size > 1):
        raise ConfigError("model.cpu_offloading goes neither with recomputation nor with pipeline stages")
    if model.cpu_offloading_num_layers and not model.cpu_offloading:
        raise ConfigError("model.cpu_offloading_num_layers needs model.cpu_offloading: set it to true")
    if model.cpu_offloading and not 0 < model.cpu_offloading_num_layers < model.num_layers:
        raise ConfigError(
            f"model.cpu_offloading_num_layers is {model.cpu_offloading_num_layers}: give 1 to"
            f" {model.num_layers - 1}"
        )


def check_profiling(config: "ConfigContainer") -> None:
    profiling = config.profiling
    first, end = profiling.profile_step_start, profiling.profile_step_end
    if end <= first:
        raise ConfigError(f"profiling looks at iterations {first} to {end}: give an end after the start")
    if is_profiled(config) and first > config.train.train_iters:
        raise ConfigError(
            f"profiling begins with iteration {first}, but the run ends with {config.train.train_iters}: set"
            " profiling.profile_step_start and profile_step_end"
        )
    if (profiling.use_pytorch_profiler or profiling.record_memory_history) and profiling.output is None:
        raise ConfigError("profiling.output is null: name the folder for what the profiler finds")


def is_profiled(config: "ConfigContainer") -> bool:
    profiling = config.profiling
    tools = profiling.use_pytorch_profiler, profiling.use_nsys_profiler, profiling.record_memory_history
    return any(tools)


def check_profiled_ranks(config: "ConfigContainer", world_size: int) -> None:
    """Refuse ranks to look at that a job of `world_size` does not have."""
    for rank in config.profiling.profile_ranks:
        if is_profiled(config) and not 0 <= rank < world_size:
            raise ConfigError(f"profiling.profile_ranks has {rank}: give ranks of 0 to {world_size - 1}")


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
    if resilience.on_nan == "skip" and config.ddp.check_for_nan_in_grad:
        raise ConfigError(
            "resilience.on_nan skip leaves gradients out that are no numbers, but ddp.check_for_nan_in_grad"
            " ends the job at the first: set one of them to its default"
        )


def check_shapes(model: "GPTModelProvider", loaded: "GPTModelProvider") -> None:
    """Refuse settings by which the weights of `loaded` would not fit into `model`."""
    for name in SHAPES:
        given, found = getattr(model, name), getattr(loaded, name)
        if given != found:
            raise ConfigError(
                f"model.{name} is {given}, and {found} in the checkpoint that the weights come from:"
                " leave it out"
            )
