"""The configuration of one training run: torch-free sections, Megatron Core's field names, JSON both ways."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider
from training import config_checks
from training.config_bounds import check_fields
from training.precision import MixedPrecisionConfig


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
    # collect Python's garbage on all ranks at once, every so many iterations, not whenever it piles up
    manual_gc: bool = True
    manual_gc_interval: int = 100


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
    # moments, master weights and gradients in the types below, by Transformer Engine's Adam
    use_precision_aware_optimizer: bool = False
    main_grads_dtype: str = "float32"
    main_params_dtype: str = "float32"
    exp_avg_dtype: str = "float32"
    exp_avg_sq_dtype: str = "float32"
    # this part of the optimizer's state lives in the host's memory and is updated there
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 1.0
    overlap_cpu_optimizer_d2h_h2d: bool = True


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
    """Which indexed datasets to read, and in which proportions; `bridgeworks data build` makes them."""

    # paths, {"path": ..., "weight": ...}, or Megatron's weight, path, weight, path, ...; without weights
    # samples are drawn in proportion to the numbers of tokens. A path is a folder of splits or a prefix.
    blend: list[object] = field(default_factory=list)
    # a blend for each of train, valid and test, in place of `blend`
    blend_per_split: dict[str, object] | None = None
    # how prefixes in `blend` are divided into train, valid and test, as "969,30,1"
    split: str | None = None
    # without a blend: Megatron's made-up sequences, to see a model run before there is text for it
    mock: bool = False
    random_seed: int = 1234
    # no loss where the model has just read the end of a document
    eod_mask_loss: bool = False
    # where sample indices are kept, for any number of runs; None: below the checkpoint folder
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
    # another run's checkpoint, or its folder of them, that the run branches off from in the same case, with
    # optimizer, schedule, random states and position in the data; `pretrained_checkpoint` is not read then
    load: str | None = None
    # write checkpoints while training goes on
    async_save: bool = False
    # read all tensors of a checkpoint before a run goes on from it; every rank reads its share
    verify_tensors: bool = True
    # where the last checkpoint is damaged, go on from the one before it
    fall_back_if_damaged: bool = False
    # go on from a checkpoint although samples are not those that the run would have seen
    allow_changed_data: bool = False
    # export checkpoints of these iterations, and the last one, to Hugging Face folders in `export_hf`
    export_hf: str | None = None
    export_interval: int | None = None
    # keep this many exports; None keeps all
    export_most_recent_k: int | None = None


@dataclass
class DistributedDataParallelConfig:
    """Megatron Core's config of the same name, as far as a run decides it; its optimizer is distributed."""

    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    # a diagnosis: every bucket is looked at before it is sent, which makes the host wait, and a gradient that
    # is no number ends the job with its rank and bucket; `resilience.on_nan` needs none of this
    check_for_nan_in_grad: bool = False
    bucket_size: int | None = None
    pad_buckets_for_high_nccl_busbw: bool = False
    reduce_scatter_with_fp32_accumulation: bool = False


@dataclass
class CommOverlapConfig:
    """Which messages between ranks are hidden behind computation; those of data parallelism are in `ddp`."""

    # needs sequence parallelism and Transformer Engine's user buffers
    tp_comm_overlap: bool = False
    tp_comm_bulk_wgrad: bool = True
    tp_comm_bulk_dgrad: bool = True
    tp_comm_overlap_ag: bool = True
    tp_comm_overlap_rs: bool = True
    tp_comm_overlap_rs_dgrad: bool = False
    tp_comm_bootstrap_backend: str = "nccl"
    # the output layer's weight gradient waits for the pipeline's end, where stages are idle
    defer_embedding_wgrad_compute: bool = False
    wgrad_deferral_limit: int = 0


@dataclass
class LoggerConfig:
    """Where the metrics of every iteration go, and every how many iterations a line is printed."""

    metrics_path: str | None = None
    log_interval: int = 10
    # a folder for TensorBoard's files
    tensorboard_dir: str | None = None
    # TFLOP/s of one GPU that count as 100%; None looks its name up in training.throughput
    peak_tflops: float | None = None


@dataclass
class ProfilingConfig:
    """A window of iterations to look at closely, on some ranks; what it finds goes into `output`."""

    use_pytorch_profiler: bool = False
    # the profiler of `nsys profile --capture-range=cudaProfilerApi` sees just the window
    use_nsys_profiler: bool = False
    record_memory_history: bool = False
    profile_step_start: int = 10
    profile_step_end: int = 12
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    output: str | None = None

    @property
    def gpu_tools(self) -> list[str]:
        """The tools that are asked for and look at a GPU."""
        return [name for name in ("use_nsys_profiler", "record_memory_history") if getattr(self, name)]

    def check_device(self, has_gpu: bool) -> None:
        """Refuse by ConfigError tools that look at a GPU where there is none."""
        if self.gpu_tools and not has_gpu:
            raise ConfigError(
                f"profiling.{self.gpu_tools[0]} looks at a GPU, and there is none: set it to false, and"
                " profiling.use_pytorch_profiler to true for a look at the CPU"
            )


@dataclass
class ResilienceConfig:
    """What to do about a loss or gradient that is no number, a loss that jumps, and ranks that hang."""

    # stop: end the run, with nothing updated or saved; skip: leave the iteration out
    on_nan: str = "stop"
    # the same, or ignore: go on, and count it
    on_spike: str = "ignore"
    # a spike is a loss above so many times the median of the last losses
    spike_factor: float = 2.0
    spike_window: int = 100
    spike_warmup_iters: int = 100
    # so many iterations in a row may be left out
    max_skipped: int = 10
    # seconds without a sign of life from one micro-batch to the next; NCCL itself gives up after 600. Not
    # counted: a start's first iteration, and the callbacks that write much. None: never
    hang_timeout: float | None = 480.0


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
    comm_overlap: CommOverlapConfig = field(default_factory=CommOverlapConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    rng: RNGConfig = field(default_factory=RNGConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)

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
            elif isinstance(section, str):
                apply_overrides(config, {name: section})
            else:
                apply_overrides(config, {f"{name}.{key}": item for key, item in section.items()})
        return config

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a job of `world_size` ranks."""
        model, ranks = self.model, self.model.model_parallel_size
        if world_size % ranks:
            raise ConfigError(
                f"{world_size} ranks cannot hold whole copies of a model spread over {ranks}:"
                f" tensor_model_parallel_size {model.tensor_model_parallel_size}"
                f" x pipeline_model_parallel_size {model.pipeline_model_parallel_size}"
                f" x context_parallel_size {model.context_parallel_size}; give a multiple of {ranks}"
            )
        if world_size % model.expert_ranks:
            raise ConfigError(
                f"{world_size} ranks cannot hold experts spread over {model.expert_ranks}:"
                f" expert_model_parallel_size {model.expert_model_parallel_size}"
                f" x expert_tensor_parallel_size {model.expert_tensor_size}"
                f" x pipeline_model_parallel_size {model.pipeline_model_parallel_size};"
                f" give a multiple of {model.expert_ranks}, by data_parallel_size or another size"
            )
        return world_size // ranks

    def num_microbatches(self, world_size: int) -> int:
        """Forward and backward passes of each rank in one iteration."""
        step = self.train.micro_batch_size * self.data_parallel_size(world_size)
        if self.train.global_batch_size % step:
            raise ConfigError(
                f"train.global_batch_size {self.train.global_batch_size} is not divisible by micro_batch_size"
                f" x data_parallel_size = {step}: give a multiple of {step}"
            )
        return self.train.global_batch_size // step

    def validate(self, world_size: int) -> "ConfigContainer":
        """Fill what follows from other fields and refuse contradictions, by ConfigError."""
        check_fields(self)
        self.mixed_precision.check()
        self.model.params_dtype = self.mixed_precision.params_dtype
        self.model.finalize()
        config_checks.check(self, self.num_microbatches(world_size))
        config_checks.check_profiled_ranks(self, world_size)
        return self


def _refuse_unknown(kind: str, given: set[str], known: set[str]) -> None:
    if unknown := sorted(given - known):
        raise ConfigError(f"unknown config {kind} {unknown[0]!r}: allowed are {', '.join(sorted(known))}")
