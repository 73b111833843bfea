"""Estimate of a rank's peak memory from a config alone: weights, gradients, optimizer, activations, logits.

Counts bytes that torch's allocator hands out at the peak of an iteration, on the rank that needs most. The
activations are what the backward pass keeps of each layer under Transformer Engine with fused attention,
counted tensor by tensor (`layer_activations`); Korthikanti et al., "Reducing Activation Recomputation in
Large Transformer Models" (2022), count the same for GPT's older layer. CUDA's context and NCCL's buffers
come on top. docs/benchmarks.md holds the estimate against measured peaks.
"""

import math
import re
from dataclasses import dataclass

from bridge.families import plan_weights
from bridge.pipeline_split import layers_of_stage
from bridge.provider import GPTModelProvider
from training.config import ConfigContainer

MASTER_AND_MOMENTS = 12  # bytes a parameter: float32 master weight and Adam's two moments
# Parameters of which every tensor-parallel rank has a whole copy.
REPLICATED = re.compile(
    r"layer_?norm|enorm|hnorm|router|q_down_proj|gate_weight|linear_proj\.bias|linear_fc2\.bias"
)
EXPERT = ".experts.experts."


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the pipeline stage that needs most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank: those that all of data parallelism shares, and those of its experts."""

    dense: int = 0
    expert: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.dense + other.dense, self.expert + other.expert)

    @property
    def total(self) -> int:
        return self.dense + self.expert


class ModelSize:
    """Parameters of a model by layer, counted once from its family's weight rules."""

    def __init__(self, provider: GPTModelProvider) -> None:
        self.layers = [{"sharded": 0, "replicated": 0, "expert": 0} for _ in range(provider.num_layers)]
        self.mtp = {"sharded": 0, "replicated": 0, "expert": 0}
        self.has_output = False
        for key, shape in plan_weights(provider).megatron_shapes.items():
            if key.startswith("decoder.layers."):
                self._count_layer(key, shape, provider.homogeneous_layers)
            elif key.startswith("mtp."):
                self.mtp[kind_of(key)] += math.prod(shape)
            self.has_output |= key == "output_layer.weight"

    def _count_layer(self, key: str, shape: tuple[int, ...], homogeneous: bool) -> None:
        numbered = re.match(r"decoder\.layers\.(\d+)\.", key)
        if numbered and not homogeneous:
            self.layers[int(numbered[1])][kind_of(key)] += math.prod(shape)
            return
        for layer in self.layers:
            layer[kind_of(key)] += math.prod(shape[1:])


def kind_of(key: str) -> str:
    if EXPERT in key:
        return "expert"
    return "replicated" if REPLICATED.search(key) else "sharded"


def estimate_memory(config: ConfigContainer, world_size: int, size: ModelSize | None = None) -> RankMemory:
    """Return the peak of the pipeline stage that needs most, for `world_size` ranks.

    `size` saves counting the parameters again when many layouts of one model are looked at.
    """
    size = size or ModelSize(config.model)
    stages = range(config.model.pipeline_model_parallel_size)
    return max((stage_memory(config, world_size, size, s) for s in stages), key=lambda memory: memory.total)


def stage_memory(config: ConfigContainer, world_size: int, size: ModelSize, stage: int) -> RankMemory:
    """Return the peak of one pipeline stage."""
    parameters = stage_parameters(config.model, size, stage)
    weight_bytes = 2 if config.mixed_precision.params_dtype != "float32" else 4
    gradient_bytes = 4 if config.mixed_precision.grad_reduce_in_fp32 else weight_bytes
    last = stage == config.model.pipeline_model_parallel_size - 1
    return RankMemory(
        weights=weight_bytes * parameters.total,
        gradients=gradient_bytes * parameters.total,
        optimizer=optimizer_bytes(config, parameters, world_size),
        activations=stage_activations(config, world_size, stage),
        logits=logits_bytes(config) if last else 0,
    )


def optimizer_bytes(config: ConfigContainer, parameters: Parameters, world_size: int) -> int:
    """Megatron's distributed optimizer shares its state out over the ranks that hold the same weights."""
    model = config.model
    dense_copies = world_size // (model.tensor_model_parallel_size * model.pipeline_model_parallel_size)
    expert_ranks = (
        expert_tensor_size(model) * model.expert_model_parallel_size * model.pipeline_model_parallel_size
    )
    expert_copies = max(1, world_size // expert_ranks)
    return MASTER_AND_MOMENTS * (
        -(-parameters.dense // dense_copies) + -(-parameters.expert // expert_copies)
    )


def expert_tensor_size(model: GPTModelProvider) -> int:
    return model.expert_tensor_parallel_size or model.tensor_model_parallel_size


def stage_parameters(model: GPTModelProvider, size: ModelSize, stage: int) -> Parameters:
    """Count one rank's parameters of a pipeline stage."""
    layers = [size.layers[layer] for layer in layers_of_stage(model, stage)]
    last = stage == model.pipeline_model_parallel_size - 1
    parameters = sum((shared_out(layer, model) for layer in layers), Parameters())
    vocabulary = model.padded_vocab_size * model.hidden_size // model.tensor_model_parallel_size
    if last:
        # Its own output projection, or past the first stage a copy of the embedding that it is tied to.
        own_output = size.has_output or stage > 0
        parameters += Parameters(model.hidden_size + (vocabulary if own_output else 0))
        parameters += shared_out(size.mtp, model)
    return parameters + Parameters(vocabulary if stage == 0 else 0)


def shared_out(counts: dict[str, int], model: GPTModelProvider) -> Parameters:
    dense = counts["sharded"] // model.tensor_model_parallel_size + counts["replicated"]
    return Parameters(
        dense, counts["expert"] // (model.expert_model_parallel_size * expert_tensor_size(model))
    )


def stage_activations(config: ConfigContainer, world_size: int, stage: int) -> int:
    """Return what the backward passes under way keep on a stage, and the work space of one layer."""
    model, layers = config.model, layers_of_stage(config.model, stage)
    in_flight = microbatches_in_flight(config, world_size, stage)
    tokens = config.train.micro_batch_size * model.seq_length // model.context_parallel_size
    per_layer = [tokens * layer_activations(model, moe=model.moe_layers[layer]) for layer in layers]
    if model.recompute_granularity == "full":
        kept = len(layers) * tokens * layer_input(model)
        return math.ceil(kept * in_flight) + math.ceil(max(per_layer))
    return math.ceil(sum(per_layer) * in_flight)


def microbatches_in_flight(config: ConfigContainer, world_size: int, stage: int) -> float:
    """Return how many microbatches' activations a stage holds at once, in whole stages.

    1F1B holds one for each stage behind; interleaving adds chunks in the warm-up
    (megatron/core/pipeline_parallel/schedules.py, get_pp_rank_microbatches).
    """
    pipeline = config.model.pipeline_model_parallel_size
    chunks = config.model.virtual_pipeline_model_parallel_size or 1
    total = config.num_microbatches(world_size) * chunks
    warm_up = pipeline - stage - 1 if chunks == 1 else 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline
    return min(total, warm_up + 1) / chunks


def layer_input(model: GPTModelProvider) -> float:
    """Bytes a token of a layer's input."""
    return 2 * model.hidden_size / (model.tensor_model_parallel_size if model.sequence_parallel else 1)


def layer_activations(model: GPTModelProvider, *, moe: bool) -> float:
    """Bytes a token that the backward pass keeps of one layer, in 16-bit precision."""
    return attention_activations(model) + (moe_activations(model) if moe else mlp_activations(model))


def attention_activations(model: GPTModelProvider) -> float:
    """Input and output of the norm; q, k, v as fused attention takes them, its output and its statistics."""
    heads, tensor = model.num_attention_heads, model.tensor_model_parallel_size
    if model.multi_latent_attention:
        latent = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_pos_emb_head_dim
        query = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
        projected = 2 * query + 2 * heads * model.v_head_dim
        return 2 * layer_input(model) + 2 * 2 * latent + (2 * projected + 4 * heads) / tensor
    query, key_value = heads * model.kv_channels, model.num_query_groups * model.kv_channels
    return 2 * layer_input(model) + (2 * (2 * query + 2 * key_value) + 4 * heads) / tensor


def mlp_activations(model: GPTModelProvider) -> float:
    """Input and output of the norm, what the activation function reads and what it gives."""
    return 2 * layer_input(model) + 2 * intermediate(model, model.ffn_hidden_size) / (
        model.tensor_model_parallel_size
    )


def intermediate(model: GPTModelProvider, width: int) -> int:
    return width * (3 if model.gated_linear_unit else 2)


def moe_activations(model: GPTModelProvider) -> float:
    """Input and output of the norm, and for each chosen expert a token's copies and its two products."""
    width = model.moe_ffn_hidden_size or model.ffn_hidden_size
    copies = 2 * 2 * model.hidden_size  # permuted on the way in and before it is summed up again
    routed = model.moe_router_topk * (copies + 2 * intermediate(model, width) / expert_tensor_size(model))
    shared = 2 * intermediate(model, model.moe_shared_expert_intermediate_size or 0)
    scores = 3 * 4 * (model.num_moe_experts or 0)
    return 2 * layer_input(model) + routed + shared / model.tensor_model_parallel_size + scores


def logits_bytes(config: ConfigContainer) -> int:
    """Return the last stage's logits in 16 bits and what the loss keeps of them in float32."""
    model = config.model
    tokens = config.train.micro_batch_size * model.seq_length // model.context_parallel_size
    return tokens * model.padded_vocab_size // model.tensor_model_parallel_size * (2 + 4 + 4)
