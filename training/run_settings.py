"""How a model is computed on the device at hand: fused kernels with Transformer Engine, none without.

A provider's fusion is None until someone decides it: then it is on where the hardware, the modules and the
model's activation allow it. One that is asked for where it cannot be is a ConfigError.
"""

from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider

FUSIONS = (
    "use_te_activation_func",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
)


def run_settings(provider: GPTModelProvider, transformer_engine: bool) -> dict[str, bool]:
    """Return values for Megatron's TransformerConfig; `transformer_engine` says whose modules it has."""
    possible = possible_fusions(provider) if transformer_engine else frozenset()
    check_offloading(provider, transformer_engine)
    check_recomputation(provider, transformer_engine)
    return {name: decided(provider, name, name in possible) for name in FUSIONS}


def possible_fusions(provider: GPTModelProvider) -> frozenset[str]:
    """Return the fusions that work for this model under Transformer Engine."""
    possible = set(FUSIONS)
    possible.remove(unused_activation(provider))
    if not fusible_activation(provider):
        possible -= {"bias_activation_fusion", "use_te_activation_func"}
    # the fused kernel knows no factor on cosines and sines, and rope_utils.py drops it for packed sequences
    scaled = provider.rope_parameters["rope_type"] in ("yarn", "longrope")
    if (
        provider.multi_latent_attention
        or provider.rotary_interleaved
        or provider.rope_local_parameters
        or scaled
    ):
        possible.remove("apply_rope_fusion")
    if provider.num_moe_experts is not None and provider.add_bias_linear:
        possible.remove("bias_dropout_fusion")  # refused by the experts' module, which adds its biases itself
    if provider.final_logit_softcapping is not None:
        possible.remove("cross_entropy_loss_fusion")  # Transformer Engine writes into the logits it is given
    return frozenset(possible)


def unused_activation(provider: GPTModelProvider) -> str:
    """Of the two kernels that a gated activation has, name the one that is not taken: by default the slower.

    Transformer Engine's is faster on an H200, but weighs no tokens, as experts need, and adds no bias.
    """
    plain = provider.gated_linear_unit and not provider.add_bias_linear and provider.num_moe_experts is None
    engine = plain and provider.use_te_activation_func is not False and not provider.bias_activation_fusion
    return "bias_activation_fusion" if engine else "use_te_activation_func"


def fusible_activation(provider: GPTModelProvider) -> bool:
    """Say whether mlp.py has a fused kernel: SwiGLU and GeGLU as they stand, GeLU with a bias."""
    # mlp.py clamps and offsets between the halves only on its unfused path
    if provider.activation_func_clamp_value is not None or provider.glu_linear_offset:
        return False
    if provider.gated_linear_unit:
        # experts weigh their tokens inside the kernel, of which there is none for gelu
        return provider.activation_func == "silu" or (
            provider.activation_func == "gelu" and provider.num_moe_experts is None
        )
    return provider.activation_func == "gelu" and provider.add_bias_linear


def decided(provider: GPTModelProvider, name: str, possible: bool) -> bool:
    asked = getattr(provider, name)
    if asked and not possible:
        raise ConfigError(
            f"model.{name} is true, but neither a model without Transformer Engine nor every architecture has"
            " it: leave it at null, which takes it where it can be"
        )
    return possible if asked is None else asked


def check_offloading(provider: GPTModelProvider, transformer_engine: bool) -> None:
    if provider.cpu_offloading and not transformer_engine:
        raise ConfigError(
            "model.cpu_offloading moves activations from a GPU by Transformer Engine, and there is none here:"
            " set it to false"
        )


def check_recomputation(provider: GPTModelProvider, transformer_engine: bool) -> None:
    """Megatron recomputes without saving an output by way of Transformer Engine's FP8 state."""
    asked = set(provider.recompute_modules or ()) & {"layernorm", "moe_act", "mla_up_proj"}
    if asked and not transformer_engine:
        raise ConfigError(
            f"model.recompute_modules has {min(asked)!r}, which only Transformer Engine can recompute, and"
            " there is none here: leave it out"
        )
