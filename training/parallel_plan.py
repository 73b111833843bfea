"""Chooses a parallel layout for a model and the GPUs at hand, by estimates of memory and of time.

The time of an iteration is what its FLOPs take at the speed that a layer reaches on the chip, and what its
messages take where nothing hides them. Its absolute value is a guess; its use is the order of layouts.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from bridge.errors import ConfigError
from training.config import ConfigContainer
from training.flops import flops_per_token
from training.memory_estimate import (
    ModelSize,
    RankMemory,
    estimate_memory,
    expert_tensor_size,
    stage_parameters,
)

NODE_SIZE = 8  # GPUs that NVLink joins
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers and fragments
MIN_TOKENS_A_RANK = 4096  # a shorter piece of a sequence is not worth splitting it
EXPOSED = 0.2  # share of gradient and weight messages that the backward pass does not hide
MICRO_BATCH_SIZES = (1, 2, 4)
# An expert's product over as few tokens runs at half of a layer's speed: a guess, not measured.
HALF_SPEED_TOKENS = 256


@dataclass(frozen=True)
class Gpu:
    """What a layout has to go by: memory in GiB, speed of a layer in TFLOP/s, messages in GB/s each way."""

    name: str
    memory: float
    bf16: float
    fp8: float | None
    nvlink: float
    network: float


# Memory as torch reports it. Speeds of layers: H200 measured (docs/benchmarks.md), the others by the ratio of
# their data sheets' dense peaks to its. Links from the data sheets, network one NIC a GPU.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 39.4, 177, None, 300, 25),
        Gpu("a100-80gb", 79.1, 177, None, 300, 25),
        Gpu("h100", 79.1, 560, 740, 450, 50),
        Gpu("h200", 139.8, 560, 740, 450, 50),
        Gpu("b200", 178.3, 1270, 1680, 900, 50),
    )
}


@dataclass(frozen=True)
class Layout:
    """The settings that a plan decides."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    micro_batch_size: int = 1
    recompute: bool = False
    # embedding and loss count as a layer each when layers are shared out over the stages
    outer_count: bool = False

    def apply(self, config: ConfigContainer) -> ConfigContainer:
        """Return the config in this layout, the rest as it is."""
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("parallel_size")}
        model = replace(
            config.model,
            **sizes,
            sequence_parallel=self.tensor_model_parallel_size > 1,
            expert_tensor_parallel_size=1 if self.expert_model_parallel_size > 1 else None,
            account_for_embedding_in_pipeline_split=self.outer_count,
            account_for_loss_in_pipeline_split=self.outer_count,
            recompute_granularity="full" if self.recompute else None,
            recompute_method="uniform" if self.recompute else None,
            recompute_num_layers=1 if self.recompute else None,
        )
        train = replace(config.train, micro_batch_size=self.micro_batch_size)
        return replace(config, model=model, train=train)

    def __str__(self) -> str:
        sizes = (
            ("TP", self.tensor_model_parallel_size),
            ("PP", self.pipeline_model_parallel_size),
            ("VPP", self.virtual_pipeline_model_parallel_size or 1),
            ("CP", self.context_parallel_size),
            ("EP", self.expert_model_parallel_size),
        )
        named = [f"{name}{size}" for name, size in sizes if size > 1] or ["DP only"]
        extras = ", fewer layers in the outer stages" if self.outer_count else ""
        extras += ", recompute" if self.recompute else ""
        return f"{' '.join(named)}, micro batch {self.micro_batch_size}{extras}"


@dataclass(frozen=True)
class Estimate:
    """One layout's memory in bytes, and the seconds of an iteration by what they are spent on."""

    layout: Layout
    memory: RankMemory
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class ParallelPlan:
    """Every layout that the sizes allow, quickest first: those that fit, and those that need more memory.

    `tokens` are those of one iteration.
    """

    gpu: Gpu
    num_gpus: int
    tokens: int
    fitting: list[Estimate]
    too_large: list[Estimate]

    @property
    def best(self) -> Estimate:
        if not self.fitting:
            least = min(self.too_large, key=lambda each: each.memory.total)
            raise ConfigError(
                f"no layout fits {self.num_gpus} x {self.gpu.name}: the smallest, {least.layout}, needs"
                f" {least.memory.total / 2**30:.0f} GiB a GPU of {self.gpu.memory * USABLE:.0f}: take more"
            )
        return self.fitting[0]

    def tokens_per_second(self, estimate: Estimate) -> float:
        """Return the estimated tokens per second and GPU."""
        return self.tokens / estimate.total_seconds / self.num_gpus


def gpu_named(name: str) -> Gpu:
    """Return a GPU of the table by its name; an unknown one is a ConfigError."""
    if name not in GPUS:
        raise ConfigError(f"unknown GPU {name!r}: known are {', '.join(GPUS)}")
    return GPUS[name]


def plan_parallel(config: ConfigContainer, num_gpus: int, gpu: Gpu) -> ParallelPlan:
    """Estimate every layout of `config`'s model on `num_gpus` GPUs; its own layout does not matter."""
    size = ModelSize(config.model)
    estimates = [
        Estimate(layout, estimate_memory(laid_out, num_gpus, size), seconds(laid_out, num_gpus, gpu, size))
        for layout, laid_out in possible(config, num_gpus)
    ]
    if not estimates:
        raise ConfigError(
            f"{num_gpus} GPUs share out neither the model nor train.global_batch_size"
            f" {config.train.global_batch_size}: make it a multiple of their number, or take another number"
        )
    limit = gpu.memory * USABLE * 2**30
    estimates.sort(key=lambda each: (each.total_seconds, each.memory.total))
    return ParallelPlan(
        gpu,
        num_gpus,
        config.train.global_batch_size * config.model.seq_length,
        fitting=[each for each in estimates if each.memory.total <= limit],
        too_large=[each for each in estimates if each.memory.total > limit],
    )


def possible(config: ConfigContainer, num_gpus: int) -> Iterator[tuple[Layout, ConfigContainer]]:
    """Yield the layouts that the model's sizes and the batch allow, with the config in each."""
    for layout in candidates(config, num_gpus):
        laid_out = layout.apply(config)
        try:
            laid_out.validate(num_gpus)
        except ConfigError:
            continue  # most combinations do not divide something: that is what is asked here
        yield layout, laid_out


def candidates(config: ConfigContainer, num_gpus: int) -> Iterator[Layout]:
    model = config.model
    tensor = [n for n in (1, 2, 4, 8) if n <= min(NODE_SIZE, num_gpus)]
    context = [n for n in powers_of_two(num_gpus) if n == 1 or model.seq_length // n >= MIN_TOKENS_A_RANK]
    expert = [n for n in powers_of_two(num_gpus) if model.num_moe_experts and model.num_moe_experts % n == 0]
    for (pp, outer), tp, cp, ep in itertools.product(
        pipelines(model.num_layers, num_gpus), tensor, context, expert or [1]
    ):
        for micro, recompute in itertools.product(MICRO_BATCH_SIZES, (False, True)):
            for chunks in (None, 2, 4) if pp > 1 else (None,):
                yield Layout(tp, pp, chunks, cp, ep, micro, recompute, outer)


def pipelines(num_layers: int, num_gpus: int) -> list[tuple[int, bool]]:
    """Return the numbers of stages into which the layers go evenly, or with embedding and loss counted."""
    sizes = range(1, min(num_layers, num_gpus) + 1)
    even = [(n, False) for n in sizes if num_layers % n == 0]
    return even + [(n, True) for n in sizes if n > 2 and num_layers % n and (num_layers + 2) % n == 0]


def powers_of_two(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length()) if 2**n <= limit]


def seconds(config: ConfigContainer, num_gpus: int, gpu: Gpu, size: ModelSize) -> dict[str, float]:
    """Return what an iteration's seconds are spent on."""
    model = config.model
    tokens = config.train.global_batch_size * model.seq_length / num_gpus
    speed = (gpu.fp8 if config.mixed_precision.fp8 and gpu.fp8 else gpu.bf16) * 1e12
    recomputed = 4 / 3 if model.recompute_granularity == "full" else 1
    flops = flops_per_token(model)
    experts = 3 * flops.mlp * sum(model.moe_layers) / model.num_layers
    slowed = flops.training + experts * HALF_SPEED_TOKENS / tokens_per_expert(config)
    compute = recomputed * tokens * slowed / speed
    chunks = model.virtual_pipeline_model_parallel_size or 1
    idle_steps = (model.pipeline_model_parallel_size - 1) / chunks
    return {
        "compute": compute,
        "bubble": compute * idle_steps / config.num_microbatches(num_gpus),
        **messages(config, num_gpus, gpu, size),
    }


def tokens_per_expert(config: ConfigContainer) -> float:
    """Return how many tokens of a microbatch one product of an expert has, from all ranks that share it."""
    model = config.model
    tokens = config.train.micro_batch_size * model.seq_length / model.context_parallel_size
    if model.expert_tensor_parallel_size == 1:
        tokens *= model.expert_model_parallel_size / model.tensor_model_parallel_size
    return tokens * model.moe_router_topk / (model.num_moe_experts or 1)


def messages(config: ConfigContainer, num_gpus: int, gpu: Gpu, size: ModelSize) -> dict[str, float]:
    """Return the seconds of an iteration's messages that computation does not hide."""
    model = config.model
    tensor, context, expert = (
        model.tensor_model_parallel_size,
        model.context_parallel_size,
        model.expert_model_parallel_size,
    )
    layers = model.num_layers / model.pipeline_model_parallel_size
    # Tokens of all microbatches that pass a rank of this stage, one after the other.
    tokens = config.train.global_batch_size * model.seq_length / config.data_parallel_size(num_gpus) / context
    hidden = 2 * tokens * model.hidden_size
    moe_layers = layers * sum(model.moe_layers) / model.num_layers
    in_node = num_gpus <= NODE_SIZE
    parameters = stage_parameters(model, size, 0).total
    copies = config.data_parallel_size(num_gpus) * context
    key_value = 2 * 2 * tokens * model.num_query_groups * model.kv_channels / tensor
    # Forward: gather and scatter around attention and MLP; backward: the same, and gathering inputs again.
    per_layer = {
        "tensor": 10 * layers * hidden * (tensor - 1) / tensor / rate(gpu, tensor),
        "expert": 4
        * moe_layers
        * model.moe_router_topk
        * hidden
        / tensor
        * (expert - 1)
        / expert
        / rate(gpu, expert_tensor_size(model) * expert),
        "context": EXPOSED * 3 * layers * key_value * (context - 1) / rate(gpu, tensor * context),
    }
    gradients = 6 * parameters * (copies - 1) / copies / ((gpu.nvlink if in_node else gpu.network) * 1e9)
    pipeline = 0.0
    if model.pipeline_model_parallel_size > 1:
        chunks = model.virtual_pipeline_model_parallel_size or 1
        link = rate(gpu, num_gpus)
        pipeline = EXPOSED * 4 * chunks * hidden / tensor / link
    return {**per_layer, "data": EXPOSED * gradients, "pipeline": pipeline}


def rate(gpu: Gpu, group: int) -> float:
    """Return the bytes a second that a rank of a group of neighbours sends."""
    return (gpu.nvlink if group <= NODE_SIZE else gpu.network) * 1e9


def plan_rows(plan: ParallelPlan, count: int = 8) -> list[dict[str, Any]]:
    """Return the best layouts, and the quickest that do not fit, as rows of a table."""
    shown = [(each, "chosen" if not number else "") for number, each in enumerate(plan.fitting[:count])]
    shown += [(each, "does not fit") for each in plan.too_large[:3]]
    return [
        {
            "layout": str(each.layout),
            "verdict": verdict,
            "memory_gib": round(each.memory.total / 2**30, 1),
            **{f"{f.name}_gib": round(getattr(each.memory, f.name) / 2**30, 1) for f in fields(RankMemory)},
            "seconds": _rounded(each.total_seconds),
            "tokens_per_second_per_gpu": round(plan.tokens_per_second(each)),
            "spent_on": {name: _rounded(value) for name, value in each.seconds.items() if value > 0},
        }
        for each, verdict in shown
    ]


def _rounded(seconds: float) -> float:
    """Keep four digits, also of the microseconds that a tiny model takes."""
    return float(f"{seconds:.4g}")
