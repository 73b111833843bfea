"""Estimate of what an iteration's seconds are spent on, and the GPUs whose speeds it knows.

The time is what the FLOPs take at the speed that a layer reaches on the chip, and what messages take where
nothing hides them. Its absolute value is a guess; its use is the order of layouts.
"""

from dataclasses import dataclass

from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider
from training.config import ConfigContainer
from training.flops import flops_per_token
from training.memory_estimate import ModelSize, expert_tensor_size, stage_parameters

NODE_SIZE = 8  # GPUs that NVLink joins
EXPOSED = 0.2  # share of gradient and weight messages that the backward pass does not hide
# An expert's product over as few tokens runs at half of a layer's speed: a guess, not measured.
HALF_SPEED_TOKENS = 256


@dataclass(frozen=True)
class Gpu:
    """What a layout has to go by: memory in GiB, speed of a layer in TFLOP/s, messages in GB/s each way."""

    name: str
    compute_capability: tuple[int, int]
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
        Gpu("a100-40gb", (8, 0), 39.4, 177, None, 300, 25),
        Gpu("a100-80gb", (8, 0), 79.1, 177, None, 300, 25),
        Gpu("h100", (9, 0), 79.1, 560, 740, 450, 50),
        Gpu("h200", (9, 0), 139.8, 560, 740, 450, 50),
        Gpu("b200", (10, 0), 178.3, 1270, 1680, 900, 50),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return a GPU of the table by its name; an unknown one is a ConfigError."""
    if name not in GPUS:
        raise ConfigError(f"unknown GPU {name!r}: known are {', '.join(GPUS)}")
    return GPUS[name]


def seconds(config: ConfigContainer, num_gpus: int, gpu: Gpu, size: ModelSize) -> dict[str, float]:
    """Return what an iteration's seconds are spent on."""
    model = config.model
    tokens = config.train.global_batch_size * model.seq_length / num_gpus
    speed = gpu.fp8 if config.mixed_precision.fp8 else gpu.bf16
    assert speed is not None, "FP8 is refused on GPUs that have none"
    recomputed = 1 + recomputed_share(model) / 3
    flops = flops_per_token(model)
    experts = 3 * flops.mlp * sum(model.moe_layers) / model.num_layers
    slowed = flops.training + experts * HALF_SPEED_TOKENS / tokens_per_expert(config)
    compute = recomputed * tokens * slowed / (speed * 1e12)
    chunks = model.virtual_pipeline_model_parallel_size or 1
    idle_steps = (model.pipeline_model_parallel_size - 1) / chunks
    return {
        "compute": compute,
        "bubble": compute * idle_steps / config.num_microbatches(num_gpus),
        **messages(config, num_gpus, gpu, size),
    }


def recomputed_share(model: GPTModelProvider) -> float:
    """Return the share of the layers whose forward pass is computed twice."""
    if model.recompute_granularity != "full":
        return 0.0
    if model.recompute_method != "block":
        return 1.0
    chunks = model.pipeline_model_parallel_size * (model.virtual_pipeline_model_parallel_size or 1)
    return min(1.0, (model.recompute_num_layers or 1) * chunks / model.num_layers)


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
