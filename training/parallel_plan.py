"""Chooses a parallel layout for a model and the GPUs at hand, by estimates of memory and of time."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bridge.errors import ConfigError
from training.config import ConfigContainer
from training.config_bounds import check_fields
from training.memory_estimate import ModelSize, RankMemory, estimate_memory
from training.time_estimate import NODE_SIZE, Gpu, seconds

USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers and fragments
MIN_TOKENS_A_RANK = 4096  # a shorter piece of a sequence is not worth splitting it
MICRO_BATCH_SIZES = (1, 2, 4)
# who says which layers a stage gets has said what a layout would
SPLIT = frozenset(
    {
        "model.num_layers_in_first_pipeline_stage",
        "model.num_layers_in_last_pipeline_stage",
        "model.account_for_embedding_in_pipeline_split",
        "model.account_for_loss_in_pipeline_split",
        "model.pipeline_model_parallel_layout",
    }
)


@dataclass(frozen=True)
class Layout:
    """What the layouts of a plan differ in."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    micro_batch_size: int = 1
    recompute: bool = False
    # embedding and loss count as a layer each when layers are shared out over the stages
    outer_count: bool = False

    def settings(self) -> dict[str, Any]:
        """Return every setting that a plan decides, by its dotted name."""
        return {
            "model.tensor_model_parallel_size": self.tensor_model_parallel_size,
            "model.pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "model.context_parallel_size": self.context_parallel_size,
            "model.expert_model_parallel_size": self.expert_model_parallel_size,
            "model.expert_tensor_parallel_size": 1 if self.expert_model_parallel_size > 1 else None,
            "model.sequence_parallel": self.tensor_model_parallel_size > 1,
            "model.virtual_pipeline_model_parallel_size": self.virtual_pipeline_model_parallel_size,
            "model.num_layers_in_first_pipeline_stage": None,
            "model.num_layers_in_last_pipeline_stage": None,
            "model.account_for_embedding_in_pipeline_split": self.outer_count,
            "model.account_for_loss_in_pipeline_split": self.outer_count,
            "model.pipeline_model_parallel_layout": None,
            "model.recompute_granularity": "full" if self.recompute else None,
            "model.recompute_method": "uniform" if self.recompute else None,
            "model.recompute_num_layers": 1 if self.recompute else None,
            "model.recompute_modules": None,
            "train.micro_batch_size": self.micro_batch_size,
        }

    def apply(self, config: ConfigContainer, fixed: Collection[str] = ()) -> ConfigContainer:
        """Return the config in this layout, with what is named in `fixed` and all else as it is."""
        changes: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
        for name, value in self.settings().items():
            section, _, field = name.partition(".")
            if name not in fixed:
                changes[section][field] = value
        return replace(
            config,
            model=replace(config.model, **changes["model"]),
            train=replace(config.train, **changes["train"]),
        )

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


DECIDED = tuple(Layout().settings())


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

    `fixed` names the settings that were not searched but are those of `config`.
    """

    config: ConfigContainer
    fixed: frozenset[str]
    gpu: Gpu
    num_gpus: int
    fitting: list[Estimate]
    too_large: list[Estimate]

    @property
    def best(self) -> Estimate:
        if not self.fitting:
            least = min(self.too_large, key=lambda each: each.memory.total)
            raise ConfigError(
                f"no layout fits {self.num_gpus} x {self.gpu.name}: the smallest, {least.layout}, needs"
                f" {least.memory.total / 2**30:.0f} GiB a GPU of {self.gpu.memory * USABLE:.0f}: take more"
                f"{or_free(self.fixed)}"
            )
        return self.fitting[0]

    @property
    def choice(self) -> ConfigContainer:
        """The config in the best layout."""
        return self.best.layout.apply(self.config, self.fixed)

    def tokens_per_second(self, estimate: Estimate) -> float:
        """Return the estimated tokens per second and GPU."""
        tokens = self.config.train.global_batch_size * self.config.model.seq_length
        return tokens / estimate.total_seconds / self.num_gpus


def plan_parallel(
    config: ConfigContainer, num_gpus: int, gpu: Gpu, fixed: Collection[str] = ()
) -> ParallelPlan:
    """Estimate every layout of `config`'s model on `num_gpus` GPUs.

    Of the settings that a plan decides (`DECIDED`), those in `fixed` stay as the config has them, and what it
    says of the others does not matter. A precision that the GPU does not have is a ConfigError.
    """
    check_fields(config)
    config.mixed_precision.check_device(gpu.compute_capability)
    size, kept = ModelSize(config.model), frozenset(fixed) & frozenset(DECIDED)
    estimates = [
        Estimate(layout, estimate_memory(laid_out, num_gpus, size), seconds(laid_out, num_gpus, gpu, size))
        for layout, laid_out in possible(config, num_gpus, kept)
    ]
    limit = gpu.memory * USABLE * 2**30
    estimates.sort(key=lambda each: (each.total_seconds, each.memory.total))
    return ParallelPlan(
        config,
        kept,
        gpu,
        num_gpus,
        fitting=[each for each in estimates if each.memory.total <= limit],
        too_large=[each for each in estimates if each.memory.total > limit],
    )


def possible(
    config: ConfigContainer, num_gpus: int, fixed: frozenset[str]
) -> list[tuple[Layout, ConfigContainer]]:
    """Return the layouts that the model's sizes and the batch allow, with the config in each."""
    found, reasons = [], {"number": Counter[str](), "settings": Counter[str]()}
    for layout in candidates(config, num_gpus, fixed):
        laid_out, kind = layout.apply(config, fixed), "number"
        try:  # most combinations do not divide something: this is how we ask
            laid_out.num_microbatches(num_gpus)  # what most fail by, and much quicker than all checks
            kind = "settings"
            laid_out.validate(num_gpus)
        except ConfigError as error:
            reasons[kind][str(error)] += 1
        else:
            found.append((layout, laid_out))
    if not found:
        most = (reasons["settings"] or reasons["number"]).most_common(1)
        blamed = f"{or_free(fixed)}: {most[0][0]}" if fixed else ""
        raise ConfigError(
            f"{num_gpus} GPUs share out neither the model nor train.global_batch_size"
            f" {config.train.global_batch_size}: make it a multiple of their number, or take another number"
            f"{blamed}"
        )
    return found


def or_free(fixed: frozenset[str]) -> str:
    """Say which settings a plan might decide if they were not given."""
    return f", or leave {', '.join(sorted(fixed))} to the plan" if fixed else ""


def candidates(config: ConfigContainer, num_gpus: int, fixed: frozenset[str]) -> Iterator[Layout]:
    model = config.model

    def choices(name: str, usual: list[Any]) -> list[Any]:
        return [setting(config, name)] if name in fixed else usual

    twos = powers_of_two(num_gpus)
    experts = [n for n in twos if model.num_moe_experts and model.num_moe_experts % n == 0]
    contexts = [n for n in twos if n == 1 or model.seq_length // n >= MIN_TOKENS_A_RANK]
    stages = list(range(1, min(model.num_layers, num_gpus) + 1))
    for (pp, outer), tp, chunks, cp, ep, micro, recompute in itertools.product(
        pipelines(
            model.num_layers,
            choices("model.pipeline_model_parallel_size", stages),
            split_given=bool(fixed & SPLIT),
        ),
        choices("model.tensor_model_parallel_size", [n for n in twos if n <= NODE_SIZE]),
        choices("model.virtual_pipeline_model_parallel_size", [None, 2, 4]),
        choices("model.context_parallel_size", contexts),
        choices("model.expert_model_parallel_size", experts or [1]),
        choices("train.micro_batch_size", list(MICRO_BATCH_SIZES)),
        [model.recompute_granularity == "full"] if "model.recompute_granularity" in fixed else [False, True],
    ):
        if chunks is None or pp > 1 or "model.virtual_pipeline_model_parallel_size" in fixed:
            yield Layout(tp, pp, chunks, cp, ep, micro, recompute, outer)


def pipelines(num_layers: int, sizes: list[int], *, split_given: bool) -> list[tuple[int, bool]]:
    """Return the numbers of stages into which the layers go evenly, or with embedding and loss counted.

    Where the config says how layers are split, or none of them does, it is every number: the checks say more.
    """
    if split_given:
        return [(n, False) for n in sizes]
    even = [(n, False) for n in sizes if num_layers % n == 0]
    counted = [(n, True) for n in sizes if n > 2 and num_layers % n and (num_layers + 2) % n == 0]
    return even + counted or [(n, False) for n in sizes]


def powers_of_two(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length()) if 2**n <= limit]


def setting(config: ConfigContainer, name: str) -> Any:
    """Return a setting by its dotted name."""
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)
