"""The configuration of one training run: torch-free sections, Megatron Core's field names, JSON both ways."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")


@dataclass
class TrainingConfig:
    """How long to train, on how much, and how often to look at held-out text."""

    train_iters: int = 0
    micro_batch_size: int = 1
    global_batch_size: int = 1
    eval_interval: int | None = None
    eval_iters: int = 8
    # None: on without a GPU, off with one
    deterministic_mode: bool | None = None


@dataclass
class OptimizerConfig:
    """Megatron Core's `OptimizerConfig`, as far as a run decides it."""

    lr: float = 3e-4
    min_lr: float = 0.0
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class SchedulerConfig:
    """The learning rate's course, in iterations; `lr_decay_iters` None means until the end of the run."""

    lr_decay_style: str = "cosine"
    lr_decay_iters: int | None = None
    lr_warmup_iters: int = 0
    lr_warmup_init: float = 0.0
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_style: str = "exponential"


@dataclass
class DatasetConfig:
    """Which indexed datasets to read: folders that `training.build_dataset` wrote, each with its splits."""

    paths: list[str] = field(default_factory=list)
    # without paths: Megatron's made-up sequences, to see a model run before there is text for it
    mock: bool = False
    # one weight a path; None draws in proportion to the number of samples
    weights: list[float] | None = None
    random_seed: int = 1234
    eod_mask_loss: bool = False
    # where Megatron keeps its sample indices; None: below the checkpoint folder
    path_to_cache: str | None = None
    num_workers: int = 0


@dataclass
class TokenizerConfig:
    """The tokenizer of the text; the datasets say which one they were made with."""

    tokenizer_model: str | None = None
    # of the made-up sequences of `dataset.mock`; None takes the model's
    vocab_size: int | None = None


@dataclass
class CheckpointConfig:
    """Where checkpoints go and where the first weights come from."""

    save: str | None = None
    save_interval: int | None = None
    # keep this many iterations; None keeps all
    most_recent_k: int | None = None
    # a Megatron folder whose weights the run starts from when `save` holds no complete checkpoint
    pretrained_checkpoint: str | None = None


@dataclass
class DistributedDataParallelConfig:
    """Megatron Core's config of the same name, as far as a run decides it; its optimizer is distributed."""

    overlap_grad_reduce: bool = False
    check_for_nan_in_grad: bool = True
    bucket_size: int | None = None


@dataclass
class MixedPrecisionConfig:
    """bf16 parameters with fp32 master weights, or fp32 throughout."""

    bf16: bool = True
    grad_reduce_in_fp32: bool = True

    @property
    def params_dtype(self) -> str:
        return "bfloat16" if self.bf16 else "float32"


@dataclass
class LoggerConfig:
    """Where the metrics of every iteration go, and every how many iterations a line is printed."""

    metrics_path: str | None = None
    log_interval: int = 10


@dataclass
class RNGConfig:
    """The seed of weights and dropout."""

    seed: int = 1234


@dataclass
class ConfigContainer:
    """Everything that one training run is told."""

    model: GPTModelProvider = field(default_factory=GPTModelProvider)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    rng: RNGConfig = field(default_factory=RNGConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON values."""
        sections = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: section.to_dict() if name == "model" else dataclasses.asdict(section)
            for name, section in sections.items()
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "ConfigContainer":
        """Rebuild a config from `to_dict`; unknown names and wrong types are a ConfigError."""
        from training.overrides import apply_overrides

        config = cls()
        _refuse_unknown("section", set(value), {f.name for f in dataclasses.fields(cls)})
        for name, section in value.items():
            if name == "model":
                config.model = GPTModelProvider.from_dict(section)
            else:
                apply_overrides(config, {f"{name}.{key}": item for key, item in section.items()})
        return config

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a job of `world_size` ranks."""
        ranks = self.model.model_parallel_size
        if world_size % ranks:
            raise ConfigError(
                f"{world_size} ranks cannot hold whole copies of a model spread over {ranks}"
                f" (tensor x pipeline x context): give a multiple of {ranks}"
            )
        return world_size // ranks

    def num_microbatches(self, world_size: int) -> int:
        """Forward and backward passes of each rank in one iteration."""
        step = self.train.micro_batch_size * self.data_parallel_size(world_size)
        if self.train.global_batch_size % step:
            raise ConfigError(
                f"train.global_batch_size {self.train.global_batch_size} is not divisible by micro_batch_size"
                f" x data-parallel size = {step}: give a multiple of {step}"
            )
        return self.train.global_batch_size // step

    def validate(self, world_size: int) -> "ConfigContainer":
        """Fill what follows from other fields and refuse contradictions, by ConfigError."""
        self.model.params_dtype = self.mixed_precision.params_dtype
        self.model.finalize()
        self._check_counts()
        self._check_schedule()
        self._check_data()
        self._check_interleaving(self.num_microbatches(world_size))
        return self

    def _check_counts(self) -> None:
        for name in ("train_iters", "micro_batch_size", "global_batch_size", "eval_iters"):
            if getattr(self.train, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self.train, name)}: give 1 or more")
        for name, interval in (
            ("train.eval_interval", self.train.eval_interval),
            ("checkpoint.save_interval", self.checkpoint.save_interval),
            ("checkpoint.most_recent_k", self.checkpoint.most_recent_k),
            ("logger.log_interval", self.logger.log_interval),
        ):
            if interval is not None and interval < 1:
                raise ConfigError(f"{name} is {interval}: give 1 or more, or null")

    def _check_schedule(self) -> None:
        style, scheduler = self.scheduler.lr_decay_style, self.scheduler
        if style not in LR_DECAY_STYLES:
            raise ConfigError(
                f"scheduler.lr_decay_style is {style!r}: allowed are {', '.join(LR_DECAY_STYLES)}"
            )
        if style == "WSD" and scheduler.lr_wsd_decay_iters is None:
            raise ConfigError("scheduler.lr_decay_style WSD needs scheduler.lr_wsd_decay_iters")
        decay_iters = scheduler.lr_decay_iters or self.train.train_iters
        if not 0 <= scheduler.lr_warmup_iters < decay_iters:
            raise ConfigError(
                f"scheduler.lr_warmup_iters is {scheduler.lr_warmup_iters}: give 0 to {decay_iters - 1},"
                f" less than the {decay_iters} iterations of the decay"
            )
        if not 0 <= self.optimizer.min_lr <= self.optimizer.lr:
            raise ConfigError(
                f"optimizer.min_lr is {self.optimizer.min_lr}: give 0 to optimizer.lr = {self.optimizer.lr}"
            )

    def _check_data(self) -> None:
        weights, paths = self.dataset.weights, self.dataset.paths
        if weights is not None and len(weights) != len(paths):
            raise ConfigError(f"dataset.weights has {len(weights)} numbers for {len(paths)} dataset.paths")

    def _check_interleaving(self, num_microbatches: int) -> None:
        pipeline = self.model.pipeline_model_parallel_size
        if self.model.virtual_pipeline_model_parallel_size and num_microbatches % pipeline:
            raise ConfigError(
                f"an interleaved pipeline of {pipeline} stages cannot run {num_microbatches} microbatches:"
                f" change train.global_batch_size so that their number is a multiple of {pipeline}"
            )


def _refuse_unknown(kind: str, given: set[str], known: set[str]) -> None:
    if unknown := sorted(given - known):
        raise ConfigError(f"unknown config {kind} {unknown[0]!r}: allowed are {', '.join(sorted(known))}")
