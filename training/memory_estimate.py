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

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
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
    weight_bytes = BYTES[config.mixed_precision.params_dtype]
    gradient_bytes = 4 if config.mixed_precision.grad_reduce_in_fp32 else weight_bytes
    last = stage == config.model.pipeline_model_parallel_size - 1
    return RankMemory(
        weights=weight_bytes * parameters.total + fp8_copies(config, size, stage),
        gradients=gradient_bytes * parameters.total,
        optimizer=optimizer_bytes(config, parameters, world_size),
        activations=stage_activations(config, world_size, stage),
        logits=logits_bytes(config) if last else 0,
    )


def fp8_copies(config: ConfigContainer, size: ModelSize, stage: int) -> int:
    """Return the bytes of the layers' weights in FP8, by rows and columns; weights kept so need none."""
    if not config.mixed_precision.fp8 or config.mixed_precision.fp8_param:
        return 0
    layers = [size.layers[layer] for layer in layers_of_stage(config.model, stage)]
    return 2 * sum(shared_out(layer, config.model).total for layer in layers)


def optimizer_bytes(config: ConfigContainer, parameters: Parameters, world_size: int) -> int:
    """Megatron's distributed optimizer shares its state out over the ranks that hold the same weights."""
    model = config.model
    dense_copies = world_size // (model.tensor_model_parallel_size * model.pipeline_model_parallel_size)
    expert_ranks = (
        expert_tensor_size(model) * model.expert_model_parallel_size * model.pipeline_model_parallel_size
    )
    expert_copies = max(1, world_size // expert_ranks)
    own = -(-parameters.dense // dense_copies) + -(-parameters.expert // expert_copies)
    return math.ceil(own * bytes_per_parameter(config))


def bytes_per_parameter(config: ConfigContainer) -> float:
    """Return those of master weight, which weights in float32 are themselves, and moments on the GPU."""
    optimizer, is_whole = config.optimizer, config.mixed_precision.params_dtype == "float32"
    master = 0 if is_whole else BYTES[optimizer.main_params_dtype]
    moments = BYTES[optimizer.exp_avg_dtype] + BYTES[optimizer.exp_avg_sq_dtype]
    share = 1 - optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 1
    return share * (master + moments)


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
    tokens *= BYTES[config.mixed_precision.params_dtype] // 2  # what is counted has 16 bits
    fp8 = config.mixed_precision.fp8 is not None
    have_experts = model.moe_layers
    each = {moe: tokens * layer_activations(model, moe=moe, fp8=fp8) for moe in set(have_experts)}
    per_layer = [each[have_experts[layer]] for layer in layers]
    if model.recompute_granularity == "full":
        kept, at_work = recomputed_layers(model, per_layer, tokens * layer_input(model))
        return math.ceil(kept * in_flight) + math.ceil(at_work)
    return math.ceil(sum(per_layer) * in_flight)


def recomputed_layers(
    model: GPTModelProvider, per_layer: list[float], layer_input: float
) -> tuple[float, float]:
    """Return what a stage keeps of layers that are recomputed, and what recomputing needs for a while.

    `uniform` keeps the input of every so many layers and recomputes these together; `block` recomputes so
    many of each chunk, one by one (megatron/core/transformer/transformer_block.py, _checkpointed_forward).
    """
    chunks, number = model.virtual_pipeline_model_parallel_size or 1, model.recompute_num_layers or 1
    a_chunk = math.ceil(len(per_layer) / chunks)
    if model.recompute_method == "block":
        inputs = chunks * min(number, a_chunk)
        return inputs * layer_input + sum(sorted(per_layer)[inputs:]), max(per_layer)
    together = min(number, a_chunk)
    return chunks * math.ceil(a_chunk / together) * layer_input, sum(sorted(per_layer)[-together:])


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


def layer_activations(model: GPTModelProvider, *, moe: bool, fp8: bool = False) -> float:
    """Bytes a token that the backward pass keeps of one layer; what enters a product is kept as it is."""
    entering = 1 if fp8 else 2
    return attention_activations(model, entering) + (
        moe_activations(model, entering) if moe else mlp_activations(model, entering)
    )


def norm_activations(model: GPTModelProvider, entering: int) -> float:
    """Count a norm's input, and its output, which enters a product."""
    return layer_input(model) * (1 + entering / 2)


def attention_activations(model: GPTModelProvider, entering: int) -> float:
    """Count the norm; q, k, v as fused attention takes them, its output and its statistics.

    In FP8 the output is kept twice: for attention's own backward pass, and as it entered the projection.
    """
    heads, tensor = model.num_attention_heads, model.tensor_model_parallel_size
    value = model.v_head_dim if model.multi_latent_attention else model.kv_channels
    fp8_output = heads * value if entering == 1 else 0
    if model.multi_latent_attention:
        latent = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_pos_emb_head_dim
        query = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
        kept, latents = 2 * (2 * query + 2 * heads * value), 2 * 2 * latent
    else:
        query, key_value = heads * model.kv_channels, model.num_query_groups * model.kv_channels
        kept, latents = 2 * (2 * query + 2 * key_value), 0
    return norm_activations(model, entering) + latents + (kept + 4 * heads + fp8_output) / tensor


def mlp_activations(model: GPTModelProvider, entering: int) -> float:
    """Count the norm, what the activation function reads and what it gives."""
    return norm_activations(model, entering) + intermediate(model, model.ffn_hidden_size, entering) / (
        model.tensor_model_parallel_size
    )


def intermediate(model: GPTModelProvider, width: int, entering: int) -> int:
    """Count the first product of an MLP in 16 bits, and what enters the second."""
    return width * ((4 if model.gated_linear_unit else 2) + entering)


def moe_activations(model: GPTModelProvider, entering: int) -> float:
    """Count the norm, and for each chosen expert a token's copies and what its two products keep.

    A rank sends out the part of the sequence that sequence parallelism gives it, and experts of one rank each
    get as much on average; only experts that are split over ranks gather their tokens from them
    (megatron/core/transformer/moe/token_dispatcher.py, MoEAlltoAllTokenDispatcher).
    """
    width = model.moe_ffn_hidden_size or model.ffn_hidden_size
    tensor, own = model.tensor_model_parallel_size, expert_tensor_size(model)
    copies = (2 + entering) * model.hidden_size  # as the experts got it, and what they gave to be summed up
    routed = model.moe_router_topk * (own * copies + intermediate(model, width, entering)) / tensor
    shared = intermediate(model, model.moe_shared_expert_intermediate_size or 0, entering)
    scores = 3 * 4 * (model.num_moe_experts or 0)
    return norm_activations(model, entering) + routed + (shared + scores) / tensor


def logits_bytes(config: ConfigContainer) -> int:
    """Return what the last stage's logits take at the peak, by the loss that computes them.

    Transformer Engine's loss puts the gradient in the logits' place: 2 bytes each, and 1 more in the mean of
    what was measured. Megatron's plain one keeps them in float32 as well, twice.
    """
    model = config.model
    tokens = config.train.micro_batch_size * model.seq_length // model.context_parallel_size
    each = 2 + 4 + 4 if model.cross_entropy_loss_fusion is False else 2 + 1
    return tokens * model.padded_vocab_size // model.tensor_model_parallel_size * each
