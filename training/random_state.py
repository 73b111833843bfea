"""The states of a rank's random generators, as an object that a checkpoint holds and a resumed run loads."""

import random
from typing import Any

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject


def sharded_random_state() -> ShardedObject:
    """Return the states of this pipeline and tensor rank, in types that a restricted load reads."""
    version, internal, gauss = random.getstate()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": numpy_state(),
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    return sharded_by_rank("rng_state", state)


def sharded_by_rank(key: str, state: Any) -> ShardedObject:
    """Return an object of each pipeline and tensor rank, equal on its data-parallel ranks."""
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    offset = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject(key, state, shape, offset, replica_id=replica)


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back; a GPU's only if the run that saved them had one too."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    set_numpy_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() != (state["cuda"] is not None):
        return  # the tracker's states are those of the other kind of generator
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def numpy_state() -> dict[str, Any]:
    """Return numpy's state with its array as a tensor, which a restricted load reads."""
    state: dict[str, Any] = dict(numpy.random.get_state(legacy=False))
    key = torch.from_numpy(state["state"]["key"].astype(numpy.int64))
    return {**state, "state": {**state["state"], "key": key}}


def set_numpy_state(state: dict[str, Any]) -> None:
    key = state["state"]["key"].numpy().astype(numpy.uint32)
    numpy.random.set_state({**state, "state": {**state["state"], "key": key}})
