"""The output layer's weight gradient, added to the gradient buffer by the matrix product itself.

Megatron's own linear layers (tensor_parallel/layers.py) do that with an extension of Apex. Transformer Engine
has the same product, so it stands in; its own layers need no help.
"""

import types

import torch
from megatron.core.tensor_parallel import layers

MODULE = "fused_weight_gradient_mlp_cuda"


def install() -> None:
    """Give Megatron's linear layers the product, unless they have Apex's."""
    if layers._grad_accum_fusion_available:
        return
    module = types.ModuleType(MODULE)
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = add_weight_gradient  # type: ignore[attr-defined]
    layers.fused_weight_gradient_mlp_cuda = module
    layers._grad_accum_fusion_available = True


def add_weight_gradient(inputs: torch.Tensor, output_gradient: torch.Tensor, main_grad: torch.Tensor) -> None:
    """Add output_gradient.T @ inputs to `main_grad` [outputs, inputs]; the others are [tokens, ...]."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(
        inputs,
        output_gradient,
        out_dtype=main_grad.dtype,
        layout="NT",
        out=main_grad,
        accumulate=True,
        grad=True,
        use_split_accumulator=False,
    )
