"""The live side of a provider: Megatron Core's config, layer spec and model, on a GPU or without one."""

import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch.nn import functional

from bridge import distributed
from bridge.latent_attention import rope_settings, set_frequencies
from bridge.layer_spec import layer_spec, uses_transformer_engine
from bridge.live_vocabulary import note_vocab_size
from bridge.model_hooks import add_hooks
from bridge.mtp_model import PredictingGPTModel, prediction_spec
from bridge.provider import GPTModelProvider
from bridge.rotary import DecoderRotaryEmbedding, attention_factor, inverse_frequencies, set_attention_factor


def gelu_tanh(inputs: torch.Tensor) -> torch.Tensor:
    return functional.gelu(inputs, approximate="tanh")


ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": functional.relu,
    "squared_relu": squared_relu,
}

# Fields that are set below in Megatron's types.
CONVERTED = {"activation_func", "params_dtype", "qk_layernorm", "transformer_impl"}


def transformer_config(
    provider: GPTModelProvider, *, perform_initialization: bool = True, **settings: Any
) -> TransformerConfig:
    """Build Megatron Core's config; without `perform_initialization` weights are unset until loaded.

    `settings` are fields of it that describe a run rather than a model, such as those of FP8.
    """
    provider.finalize()
    dtype = getattr(torch, provider.params_dtype)
    interleaved = provider.virtual_pipeline_model_parallel_size is not None
    config_class = MLATransformerConfig if provider.multi_latent_attention else TransformerConfig
    known = {field.name for field in dataclasses.fields(config_class)}
    described = {name: value for name, value in vars(provider).items() if name in known - CONVERTED}
    if provider.multi_latent_attention:
        described.update(rope_settings(provider))
    config = config_class(
        **{**described, **settings},
        transformer_impl="transformer_engine" if uses_transformer_engine(provider) else "local",
        moe_grouped_gemm=provider.num_moe_experts is not None and uses_transformer_engine(provider),
        activation_func=ACTIVATIONS[provider.activation_func],
        # Megatron sums the gradients of these over tensor-parallel ranks: wrong for a norm of all heads.
        qk_layernorm=provider.qk_layernorm and provider.qk_layernorm_scope == "head",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        perform_initialization=perform_initialization,
        # With two stages both neighbours are one rank, and batched messages of the interleaved schedule get
        # mixed up without an error: Megatron's own argument parser sets the two in this way.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # gloo may still be sending an output when the schedule frees it.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
    )
    if not provider.multi_latent_attention:
        set_attention_factor(config, attention_factor(provider))
    return config


def provide(
    provider: GPTModelProvider,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
) -> GPTModel:
    """Build one model chunk; by default with the embedding and the output where the pipeline has them."""
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    if pre_process is None:
        pre_process = parallel_state.is_pipeline_first_stage(**stage)
    if post_process is None:
        post_process = parallel_state.is_pipeline_last_stage(**stage)
    config = config or transformer_config(provider)
    layers = layer_spec(provider, config, vp_stage)
    predicts = config.mtp_num_layers is not None
    model = (PredictingGPTModel if predicts else GPTModel)(
        config,
        layers,
        mtp_block_spec=prediction_spec(provider, config, vp_stage),
        vocab_size=provider.padded_vocab_size,
        max_sequence_length=provider.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=provider.share_embeddings_and_output_weights,
        position_embedding_type=provider.position_embedding_type,
        rotary_percent=provider.rotary_percent,
        rotary_base=provider.rotary_base,
        vp_stage=vp_stage,
    )
    if provider.multi_latent_attention:
        set_frequencies(model, inverse_frequencies(provider).to(distributed.device()))
    else:
        model.rotary_pos_emb = DecoderRotaryEmbedding(provider, distributed.device())
    add_hooks(model, provider)
    note_vocab_size(model, provider.vocab_size)
    if post_process:
        mask_padded_logits(model, provider)
    return model


def mask_padded_logits(model: GPTModel, provider: GPTModelProvider) -> None:
    """Keep the rows that only pad the vocabulary out of every softmax.

    Megatron counts them in; then the loss would depend on the padding, which depends on the parallel layout.
    """
    if provider.padded_vocab_size == provider.vocab_size:
        return

    def mask(module: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, Any]) -> tuple[Any, Any]:
        logits, bias = outputs
        columns = logits.size(-1)
        gathered = columns == provider.padded_vocab_size
        first = 0 if gathered else columns * parallel_state.get_tensor_model_parallel_rank()
        padding = torch.arange(first, first + columns, device=logits.device) >= provider.vocab_size
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias

    model.output_layer.register_forward_hook(mask)


def provide_distributed_model(
    provider: GPTModelProvider,
    wrap_with_ddp: bool = True,
    ddp_config: DistributedDataParallelConfig | None = None,
    seed: int = distributed.DEFAULT_SEED,
    perform_initialization: bool = True,
) -> list[Any]:
    """Build this rank's model chunks on its device, in mixed precision and wrapped for data parallelism.

    Without a process group this makes one: torchrun's, or a single process.
    """
    provider.finalize()
    distributed.initialize(provider, seed)
    config = transformer_config(provider, perform_initialization=perform_initialization)
    stages = provider.virtual_pipeline_model_parallel_size
    chunks = [
        on_device(provide(provider, vp_stage=stage, config=config), config)
        for stage in (range(stages) if stages else [None])
    ]
    return wrap(chunks, config, ddp_config) if wrap_with_ddp else chunks


def on_device(model: GPTModel, config: TransformerConfig) -> torch.nn.Module:
    """Move a chunk to this rank's device and, for 16-bit weights, give it its precision."""
    for parameter in model.parameters():
        # Megatron's gradient norm counts a parameter by these attributes, which torch's norms do not set.
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    model.to(distributed.device())
    return Float16Module(config, model) if config.bf16 or config.fp16 else model


def wrap(
    chunks: list[torch.nn.Module], config: TransformerConfig, ddp_config: DistributedDataParallelConfig | None
) -> list[DistributedDataParallel]:
    """Wrap the chunks in Megatron's DDP, with equal weights on all data-parallel ranks."""
    ddp_config = ddp_config or DistributedDataParallelConfig(grad_reduce_in_fp32=config.bf16)
    wrapped = [
        # Only the first chunk's gradients have time to travel while others are computed.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped
