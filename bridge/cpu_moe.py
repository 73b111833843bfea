"""Makes Megatron Core 0.16's mixture of experts run on the CPU with gloo, in the manner of `bridge.cpu`.

Every patch says which upstream file needs it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def route_with_torch() -> None:
    """moe/moe_utils.py asks for Transformer Engine's product without looking whether it was imported."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


def number_split_sizes() -> None:
    """moe/token_dispatcher.py turns split sizes into numbers on a CUDA stream, on their way to the CPU."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def to_numbers(self: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if torch.is_tensor(sizes := getattr(self, name)):
                setattr(self, name, sizes.numpy())
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = to_numbers
    # anything but None, or it makes a stream
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()


def pad_uneven_messages() -> None:
    """tensor_parallel/mappings.py gathers and scatters parts of different sizes, which gloo cannot."""
    from megatron.core.tensor_parallel import mappings

    gather_even = mappings._gather_along_first_dim
    scatter_even = mappings._reduce_scatter_along_first_dim

    def gather(
        tensor: Tensor, group: Any, sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return gather_even(tensor, group, None, use_global_buffer)
        longest = max(int(size) for size in sizes)
        parts = gather_even(padded(tensor, longest), group).unflatten(0, (len(sizes), longest))
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

    def scatter(
        tensor: Tensor, group: Any, sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return scatter_even(tensor, group, None, use_global_buffer)
        lengths = [int(size) for size in sizes]
        parts = [padded(part, max(lengths)) for part in tensor.split(lengths)]
        return scatter_even(torch.cat(parts), group)[: lengths[group.rank()]].contiguous()

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = scatter


def padded(tensor: Tensor, rows: int) -> Tensor:
    """Add rows of zeros until there are `rows`."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def add_biases_of_experts() -> None:
    """transformer/mlp.py adds an expert's bias in place, to what may be a view of an autograd function's.

    tensor_parallel/layers.py then has its gradient summed over tensor-parallel ranks that sequence
    parallelism gave different tokens; but each of them has experts of its own.
    """
    from megatron.core.tensor_parallel import layers
    from megatron.core.utils import get_tensor_model_parallel_group_if_none

    reduce, build = layers.reduce_from_tensor_model_parallel_region, layers.RowParallelLinear.__init__

    def reduce_many(tensor: Tensor, group: Any = None) -> Tensor:
        group = get_tensor_model_parallel_group_if_none(group)
        return tensor if group.size() == 1 else reduce(tensor, group=group)

    def build_with_bias(self: Any, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        if self.is_expert and self.expert_parallel and self.bias is not None:
            self.bias.sequence_parallel = False
            # each rank's counts in the norm of all gradients
            self.bias.tensor_model_parallel = True

    layers.reduce_from_tensor_model_parallel_region = reduce_many
    layers.RowParallelLinear.__init__ = build_with_bias


PATCHES: tuple[Callable[[], None], ...] = (
    route_with_torch,
    number_split_sizes,
    pad_uneven_messages,
    add_biases_of_experts,
)
