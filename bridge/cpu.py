"""Makes Megatron Core 0.16 run on the CPU with gloo: one small patch for each thing that it expects of CUDA.

Nothing happens on import. `install()` is called by `bridge.distributed.initialize`, works once per process
and has no effect where a GPU is present. Every patch says which upstream file needs it.
"""

import functools
import logging
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from bridge import cpu_moe
from bridge.job import die_with_parent

CPU = torch.device("cpu")
FACTORIES = ("arange", "as_tensor", "empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros")


@functools.cache
def install() -> None:
    """Patch torch and Megatron Core in this process, unless it has a GPU."""
    if torch.cuda.is_available():
        return
    for patch in PATCHES:
        patch()


def is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def name_cpu_as_current_device() -> None:
    """tensor_parallel/layers.py and forty more files pass `device=torch.cuda.current_device()` to torch."""
    torch.cuda.current_device = lambda: CPU


def silence_device_calls() -> None:
    """pipeline_parallel/p2p_communication.py, timers.py and dist_checkpointing wait for the device."""
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.set_device = lambda device: None
    torch.cuda.empty_cache = lambda: None


def create_on_cpu() -> None:
    """optimizer/optimizer.py, clip_grads.py and pipeline_parallel/schedules.py write `device="cuda"`.

    Plain wrappers rather than a TorchFunctionMode: a mode ends at `Tensor.backward` and at a thread's border.
    """
    # `with torch.device("meta")` keeps a cached set of the factories: fill it while they are the originals.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):  # models/common/embeddings/rope_utils.py
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def stay_on_cpu() -> None:
    """dist_checkpointing/exchange_utils.py and optimizer/distrib_optimizer.py call `.cuda()` on tensors."""
    move = torch.Tensor.to

    @functools.wraps(move)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(CPU if is_cuda(arg) else arg for arg in args)
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return move(self, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


def report_cuda_types() -> None:
    """optimizer/optimizer.py, distrib_optimizer.py and clip_grads.py compare `type()` with torch.cuda.*."""
    cast = torch.Tensor.type

    @functools.wraps(cast)
    def report(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return cast(self, *args, **kwargs)
        return cast(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = report


def use_cpu_generator() -> None:
    """tensor_parallel/random.py tracks states of the CUDA generator; here they are states of the CPU's."""
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = random._get_cuda_rng_state = get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = random._set_cuda_rng_state = set_state
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    # It warns on every fork that the CPU's state changed, which is what is wanted here.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def build_all_norms() -> None:
    """transformer/torch_norm.py refuses sequence parallelism and zero-centered weights."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from bridge.norms import build_norm

    def build(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> torch.nn.Module:
        return build_norm(config, hidden_size, eps)

    WrappedTorchNorm.__new__ = staticmethod(build)


def keep_transformer_engine_out() -> None:
    """transformer_block.py, optimizer.py and clip_grads.py take Transformer Engine wherever it is installed.

    Its final norm and multi-tensor kernels are for CUDA only, and a machine that has it may hide its GPUs.
    multi_latent_attention.py thinks that it is there even where it is not.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.transformer import multi_latent_attention, transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    transformer_block.LayerNormImpl = WrappedTorchNorm
    multi_latent_attention.HAVE_TE = False
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm


def fork_result_queue() -> None:
    """dist_checkpointing/strategies/filesystem_async.py spawns a process for a queue at the first save.

    That process imports torch and `__main__` again, which takes six seconds; without CUDA a fork is safe. It
    would also outlive a rank that is killed, and with it the rank's open files and locks.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    @functools.cache
    def result_queue() -> Any:
        manager = SyncManager(ctx=torch.multiprocessing.get_context("fork"))
        manager.start(die_with_parent)
        return manager.Queue()

    filesystem_async._get_write_results_queue = result_queue


def use_cpu_adam() -> None:
    """optimizer/__init__.py falls back to torch's Adam, which distrib_optimizer.py resumes wrongly."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from bridge.cpu_adam import CpuAdam

    optimizer.Adam = distrib_optimizer.Adam = CpuAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


PATCHES: tuple[Callable[[], None], ...] = (
    name_cpu_as_current_device,
    silence_device_calls,
    create_on_cpu,
    stay_on_cpu,
    report_cuda_types,
    use_cpu_generator,
    build_all_norms,
    keep_transformer_engine_out,
    fork_result_queue,
    use_cpu_adam,
    *cpu_moe.PATCHES,
)
