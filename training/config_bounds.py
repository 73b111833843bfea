"""What a single field of a config may be: one of some values, or a number between two."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge.errors import ConfigError

if TYPE_CHECKING:
    from training.config import ConfigContainer

# Those of Megatron Core 0.16, less what neither our families nor our modules have.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "model.activation_func": ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu"),
    "model.normalization": ("RMSNorm", "LayerNorm"),
    "model.position_embedding_type": ("rope",),
    "model.softmax_type": ("vanilla", "learnable"),
    "model.qk_layernorm_scope": ("head", "layer"),
    "model.moe_router_score_function": ("softmax", "sigmoid"),
    "model.moe_router_dtype": (None, "fp32", "fp64"),
    "model.moe_token_dispatcher_type": ("allgather", "alltoall", "flex"),
    "model.moe_router_load_balancing_type": (
        "aux_loss",
        "seq_aux_loss",
        "global_aux_loss",
        "sinkhorn",
        "none",
    ),
    "model.recompute_granularity": (None, "selective", "full"),
    "model.recompute_method": (None, "uniform", "block"),
    "model.cross_entropy_fusion_impl": ("te", "native"),
    "mixed_precision.fp8_amax_compute_algo": ("most_recent", "max"),
    "comm_overlap.tp_comm_bootstrap_backend": ("nccl", "gloo", "mpi"),
    "scheduler.lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    "scheduler.lr_wsd_decay_style": ("exponential", "linear", "cosine", "minus_sqrt"),
    "resilience.on_nan": ("stop", "skip"),
    "resilience.on_spike": ("stop", "skip", "ignore"),
    "optimizer.main_grads_dtype": ("float32", "bfloat16"),
    "optimizer.main_params_dtype": ("float32", "float16"),
    "optimizer.exp_avg_dtype": ("float32", "float16", "bfloat16", "uint8"),
    "optimizer.exp_avg_sq_dtype": ("float32", "float16", "bfloat16", "uint8"),
}
RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm", "moe_act", "moe", "mla_up_proj", "shared_experts")


class Bounds(NamedTuple):
    """A range of numbers, either end of which may belong to it or not."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def has(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = f"{self.least} or more" if self.least is not None else f"more than {self.above}"
        if self.most is not None:
            return f"{low}, at most {self.most}"
        return f"{low}, less than {self.below}" if self.below is not None else low


COUNT, NOT_NEGATIVE, POSITIVE = Bounds(least=1), Bounds(least=0), Bounds(above=0)
SHARE = Bounds(least=0, below=1)
# A field that is null is not looked at.
BOUNDS = {
    "model.seq_length": COUNT,
    "model.make_vocab_size_divisible_by": COUNT,
    "model.virtual_pipeline_model_parallel_size": COUNT,
    "model.expert_tensor_parallel_size": COUNT,
    "model.recompute_num_layers": COUNT,
    "model.hidden_dropout": SHARE,
    "model.attention_dropout": SHARE,
    "train.train_iters": COUNT,
    "train.micro_batch_size": COUNT,
    "train.global_batch_size": COUNT,
    "train.eval_iters": COUNT,
    "train.eval_interval": COUNT,
    "train.manual_gc_interval": COUNT,
    "optimizer.lr": NOT_NEGATIVE,
    "optimizer.min_lr": NOT_NEGATIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.adam_beta1": SHARE,
    "optimizer.adam_beta2": SHARE,
    "optimizer.adam_eps": POSITIVE,
    "optimizer.clip_grad": NOT_NEGATIVE,
    "optimizer.optimizer_offload_fraction": Bounds(above=0, most=1),
    "scheduler.lr_decay_iters": COUNT,
    "scheduler.lr_warmup_iters": NOT_NEGATIVE,
    "scheduler.lr_warmup_init": NOT_NEGATIVE,
    "scheduler.lr_wsd_decay_iters": COUNT,
    "dataset.random_seed": NOT_NEGATIVE,
    "dataset.num_workers": NOT_NEGATIVE,
    "tokenizer.vocab_size": COUNT,
    "checkpoint.save_interval": COUNT,
    "checkpoint.most_recent_k": COUNT,
    "checkpoint.export_interval": COUNT,
    "checkpoint.export_most_recent_k": COUNT,
    "ddp.bucket_size": COUNT,
    "comm_overlap.wgrad_deferral_limit": NOT_NEGATIVE,
    "mixed_precision.loss_scale": POSITIVE,
    "mixed_precision.initial_loss_scale": POSITIVE,
    "mixed_precision.min_loss_scale": POSITIVE,
    "mixed_precision.loss_scale_window": COUNT,
    "mixed_precision.hysteresis": COUNT,
    "mixed_precision.fp8_amax_history_len": COUNT,
    "mixed_precision.fp8_margin": NOT_NEGATIVE,
    "mixed_precision.num_layers_at_start_in_bf16": NOT_NEGATIVE,
    "mixed_precision.num_layers_at_end_in_bf16": NOT_NEGATIVE,
    "logger.log_interval": COUNT,
    "logger.peak_tflops": POSITIVE,
    "profiling.profile_step_start": COUNT,
    "resilience.spike_factor": Bounds(above=1),
    "resilience.spike_window": COUNT,
    "resilience.spike_warmup_iters": COUNT,
    "resilience.max_skipped": NOT_NEGATIVE,
    "resilience.hang_timeout": COUNT,
    "rng.seed": NOT_NEGATIVE,
}


def check_fields(config: "ConfigContainer") -> None:
    """Refuse every value that is none of those allowed, outside its bounds or no number, by ConfigError."""
    fields = dict(_fields(config))
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}: give a number")
    for name, allowed in ALLOWED.items():
        if fields[name] not in allowed:
            raise ConfigError(f"{name} is {fields[name]!r}: allowed are {', '.join(map(_shown, allowed))}")
    for name, bounds in BOUNDS.items():
        if fields[name] is not None and not bounds.has(fields[name]):
            raise ConfigError(f"{name} is {fields[name]}: give {bounds}")
    if unknown := set(config.model.recompute_modules or ()) - set(RECOMPUTE_MODULES):
        raise ConfigError(
            f"model.recompute_modules has {min(unknown)!r}: allowed are {', '.join(RECOMPUTE_MODULES)}"
        )


def _fields(config: "ConfigContainer") -> Iterator[tuple[str, Any]]:
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            yield f"{section.name}.{field.name}", getattr(values, field.name)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
