"""Starts and ends the process group of a job, from torchrun's environment or as a single process."""

import gc
import os
import random

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from torch import distributed

from bridge import cpu
from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider

DEFAULT_SEED = 1234


def device() -> torch.device:
    """Return the device of this rank: its own GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def initialize(provider: GPTModelProvider, seed: int = DEFAULT_SEED) -> None:
    """Make this process a rank of Megatron Core with the provider's parallel sizes and seeded generators.

    A second call with the same sizes changes nothing, one with other sizes is a ConfigError.
    """
    cpu.install()
    start_process_group()
    if parallel_state.model_parallel_is_initialized():
        check_same_sizes(provider)
        return
    check_world_size(provider)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=provider.tensor_model_parallel_size,
        pipeline_model_parallel_size=provider.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=provider.virtual_pipeline_model_parallel_size,
        context_parallel_size=provider.context_parallel_size,
        expert_model_parallel_size=provider.expert_model_parallel_size,
        expert_tensor_parallel_size=provider.expert_tensor_parallel_size,
    )
    seed_generators(seed)


def start_process_group() -> None:
    """Join torchrun's process group, or make one of this single process."""
    if distributed.is_initialized():
        return
    here = device()
    if here.type == "cuda":
        # Megatron's overlap of tensor-parallel messages and matrix products counts on this order of kernels.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(here)
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        distributed.init_process_group(backend)
    else:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def seed_generators(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's own states, which differ between tensor-parallel ranks.

    Pipeline stages get different seeds as well, as in Megatron's own trainer.
    """
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def finalize() -> None:
    """End the process group; under torchrun it was the only one that its ranks can start."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def leave_model_parallel() -> None:
    """Give up Megatron Core's groups, so that this process can build a model in another layout; all ranks.

    Megatron's destroy_model_parallel only forgets them. Those of gloo then keep three threads each, one of
    which wakes up a hundred times a second, and those of NCCL their memory.
    """
    distributed.barrier()  # none may leave while another one still waits for its last message
    parallel_state.destroy_model_parallel()
    gc.collect()
    for group in list(distributed.distributed_c10d._world.pg_map):
        if group is not distributed.group.WORLD:
            distributed.destroy_process_group(group)


def check_world_size(provider: GPTModelProvider) -> None:
    ranks = distributed.get_world_size()
    for names, size in (
        ("tensor x pipeline x context", provider.model_parallel_size),
        ("expert x expert tensor x pipeline", provider.expert_ranks),
    ):
        if ranks % size:
            raise ConfigError(
                f"{ranks} ranks cannot hold {names} parallel sizes of {size}: start a multiple of {size}"
                " ranks with torchrun, or choose smaller sizes"
            )


def running_sizes() -> dict[str, int | None]:
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def check_same_sizes(provider: GPTModelProvider) -> None:
    for name, running in running_sizes().items():
        if getattr(provider, name) != running:
            raise ConfigError(
                f"{name} is {getattr(provider, name)}, but this process already runs with {running}:"
                " call bridge.distributed.leave_model_parallel() before building another"
            )
