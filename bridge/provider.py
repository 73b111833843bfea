"""A GPT model described in Megatron Core's own words, and the way from there to a live model.

Torch-free until a model is asked for: recipes, plans and conversions use the description alone.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bridge.errors import ConfigError
from bridge.value_types import first_misfit, shown

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

DTYPES = ("float32", "bfloat16", "float16")
TRANSFORMER_IMPLS = ("auto", "local", "transformer_engine")


@dataclass
class GPTModelProvider:
    """Architecture, parallel layout and run settings of one GPT model.

    Fields that Megatron Core has are spelt as in its `TransformerConfig` and `GPTModel`; the defaults
    describe a Llama-like decoder. Sizes are counts of elements; `vocab_size` is the tokenizer's, unpadded.
    Everything is a plain value, so that a description is JSON both ways.
    """

    num_layers: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int = 0
    num_attention_heads: int = 0
    num_query_groups: int = 0
    kv_channels: int = 0
    vocab_size: int = 0
    max_position_embeddings: int = 0

    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-5
    gated_linear_unit: bool = True
    activation_func: str = "silu"
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    window_size: tuple[int, int] | None = None
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    layernorm_zero_centered_gamma: bool = False
    # clamp and offset of gpt-oss' gated activation
    activation_func_clamp_value: float | None = None
    glu_linear_offset: float = 0.0
    # window_size holds for all layers but every nth, or for those with a 1 in the list
    window_attn_skip_freq: int | list[int] | None = None
    softmax_type: str = "vanilla"
    # None: one over the square root of the head size
    softmax_scale: float | None = None

    # None: a dense model
    num_moe_experts: int | None = None
    # 1: experts in every layer; a list has a 1 for each layer with experts
    moe_layer_freq: int | list[int] = 1
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_router_topk: int = 2
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    # a group of experts counts by the sum of its best ones' scores, so many of them
    moe_router_group_members: int = 2
    moe_router_topk_scaling_factor: float | None = None
    moe_router_enable_expert_bias: bool = False
    moe_router_bias_update_rate: float = 1e-3
    moe_router_load_balancing_type: str = "aux_loss"
    moe_aux_loss_coeff: float = 0.0
    moe_z_loss_coeff: float | None = None
    moe_router_dtype: str | None = "fp32"
    moe_token_dispatcher_type: str = "alltoall"

    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_head_dim: int = 0
    qk_pos_emb_head_dim: int = 0
    v_head_dim: int = 0
    # of the norms of queries' and keys' latents, whatever layernorm_epsilon is
    latent_layernorm_epsilon: float = 1e-6

    mtp_num_layers: int | None = None
    mtp_loss_scaling_factor: float = 0.1

    # What Megatron Core has no field for; bridge.layer_spec and bridge.model bring the modules.
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    # factor on the embedding's output
    embedding_scale: float | None = None
    # norms in front of attention and MLP, and norms on what the two add to the residual
    pre_layernorm: bool = True
    post_layernorm: bool = False
    # qk_layernorm over each "head", or over all heads of a "layer" at once
    qk_layernorm_scope: str = "head"
    # rope_parameters of the layers with a sliding window, where they differ
    rope_local_parameters: dict[str, Any] | None = None

    share_embeddings_and_output_weights: bool = False
    make_vocab_size_divisible_by: int = 128
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    # transformers' normal form: {"rope_type": "llama3", "rope_theta": ..., "factor": ...}
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})

    seq_length: int = 0
    params_dtype: str = "float32"
    transformer_impl: str = "auto"

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    pipeline_model_parallel_layout: str | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False

    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    # of selective recomputation: core_attn, mlp, layernorm, moe_act, moe, mla_up_proj, shared_experts
    recompute_modules: list[str] | None = None
    # activations of so many layers wait in the host's memory for their backward pass
    cpu_offloading: bool = False
    cpu_offloading_num_layers: int = 0
    cpu_offloading_activations: bool = True
    cpu_offloading_weights: bool = False

    # None: in training on where the device and the model have them (training.run_settings), else off
    use_te_activation_func: bool | None = None
    bias_activation_fusion: bool | None = None
    bias_dropout_fusion: bool | None = None
    masked_softmax_fusion: bool | None = None
    apply_rope_fusion: bool | None = None
    cross_entropy_loss_fusion: bool | None = None
    gradient_accumulation_fusion: bool | None = None
    cross_entropy_fusion_impl: str = "te"

    hf_model_type: str = ""
    # the config that the model came from, whose spelling an export keeps where it still holds
    hf_config: dict[str, Any] = field(default_factory=dict)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory: a multiple of `make_vocab_size_divisible_by` on every rank."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    @property
    def num_padding_rows(self) -> int:
        """Rows of the embedding in memory that are no token's."""
        return self.padded_vocab_size - self.vocab_size

    @property
    def moe_layers(self) -> list[bool]:
        """Say for each layer whether its MLP is a mixture of experts."""
        if self.num_moe_experts is None:
            return [False] * self.num_layers
        if isinstance(self.moe_layer_freq, int):
            return [layer % self.moe_layer_freq == 0 for layer in range(self.num_layers)]
        return [bool(number) for number in self.moe_layer_freq]

    @property
    def num_expert_layers(self) -> int:
        """Experts of all layers, or the layers, if they have none: the plan of the weights grows with it."""
        return (self.num_layers + (self.mtp_num_layers or 0)) * max(1, self.num_moe_experts or 1)

    @property
    def homogeneous_layers(self) -> bool:
        """Say whether Megatron saves all layers as one tensor with a leading axis.

        As TransformerBlock.sharded_state_dict has it (megatron/core/transformer/transformer_block.py).
        """
        return self.moe_layer_freq == 1

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert, `expert_tensor_parallel_size` or Megatron's default for it."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that all experts of the model take; they are not more than those of data parallelism."""
        return self.expert_model_parallel_size * self.expert_tensor_size * self.pipeline_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that one copy of the model takes."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    def finalize(self) -> "GPTModelProvider":
        """Fill what follows from other fields and refuse what cannot be, by ConfigError."""
        self.kv_channels = self.kv_channels or self.hidden_size // max(1, self.num_attention_heads)
        self.num_query_groups = self.num_query_groups or self.num_attention_heads
        self.seq_length = self.seq_length or self.max_position_embeddings
        self._check_values()
        self._check_parallel_sizes()
        return self

    def _check_values(self) -> None:
        types = {field.name: field.type for field in dataclasses.fields(self)}
        if name := first_misfit(vars(self), types):
            raise ConfigError(f"model.{name} is {getattr(self, name)!r}: expected {shown(types[name])}")
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}: give a positive number")
        if self.num_expert_layers > MAX_EXPERT_LAYERS:
            raise ConfigError(
                f"model.num_layers is {self.num_layers}, model.mtp_num_layers {self.mtp_num_layers} and"
                f" model.num_moe_experts {self.num_moe_experts}: at most {MAX_EXPERT_LAYERS} experts in all"
                " layers together are allowed"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"model.num_attention_heads {self.num_attention_heads} is not divisible by"
                f" model.num_query_groups {self.num_query_groups}"
            )
        for name, value, allowed in (
            ("params_dtype", self.params_dtype, DTYPES),
            ("transformer_impl", self.transformer_impl, TRANSFORMER_IMPLS),
        ):
            if value not in allowed:
                raise ConfigError(f"model.{name} is {value!r}: allowed are {', '.join(allowed)}")

    def _check_parallel_sizes(self) -> None:
        from bridge.expert_checks import check_experts
        from bridge.pipeline_split import check_pipeline_split

        tensor = self.tensor_model_parallel_size
        for name in PARALLEL_SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}: give 1 or more")
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            if getattr(self, name) % tensor:
                raise ConfigError(
                    f"model.{name} {getattr(self, name)} is not divisible by"
                    f" tensor_model_parallel_size {tensor}: choose a divisor of {getattr(self, name)}"
                )
        check_pipeline_split(self)
        check_experts(self)
        if self.sequence_parallel and tensor == 1:
            raise ConfigError(
                "model.sequence_parallel needs tensor_model_parallel_size > 1: choose that or set it to false"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain JSON values."""
        value = dataclasses.asdict(self)
        value["window_size"] = list(self.window_size) if self.window_size else None
        return value

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "GPTModelProvider":
        """Rebuild a description from `to_dict`; an unknown key is a ConfigError."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(value) - known):
            raise ConfigError(f"unknown model setting {unknown[0]!r}: allowed are {', '.join(sorted(known))}")
        window = value.get("window_size")
        return cls(**{**value, "window_size": (window[0], window[1]) if window else None})

    def transformer_config(self) -> "TransformerConfig":
        """Build Megatron Core's own config."""
        from bridge.model import transformer_config

        return transformer_config(self)

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> "GPTModel":
        """Build this rank's part of the model; parallel state must be initialised."""
        from bridge.model import provide

        return provide(self, pre_process, post_process, vp_stage)

    def provide_distributed_model(self, **options: Any) -> list[Any]:
        """Build this rank's model chunks, one per virtual pipeline stage; see `bridge.model`."""
        from bridge.model import provide_distributed_model

        return provide_distributed_model(self, **options)


# Kimi K2 has 23,424. A wrong number must not take all memory, for a plan of weights that are not there.
MAX_EXPERT_LAYERS = 250_000
SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
)
PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
