"""Weights between a live, sharded model and a Hugging Face checkpoint, by the plan of conversions on disk.

Nothing here knows about tensor or pipeline parallelism: each rank's `ShardedTensor`s say which box of which
global tensor it holds.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from bridge.distributed import device
from bridge.errors import BridgeworksError, CoverageError
from bridge.families import plan_weights
from bridge.gather_plan import plan_pieces
from bridge.gathering import Gathering, model_replica
from bridge.hf_checkpoint import HfCheckpoint
from bridge.provider import GPTModelProvider
from bridge.shards import blocks_by_tensor, check_model_coverage, gather_boxes, shards_of
from bridge.weight_sources import HfSource, WeightSource

CPU_BUCKET_SIZE = 64 << 20
GPU_BUCKET_SIZE = 512 << 20


def load_hf_weights(
    chunks: Sequence[torch.nn.Module], provider: GPTModelProvider, checkpoint: HfCheckpoint
) -> None:
    """Fill this rank's model chunks with its own slices of a Hugging Face checkpoint, cast to their dtype."""
    fill(chunks, HfSource(plan_weights(provider), checkpoint))


def fill(chunks: Sequence[torch.nn.Module], source: WeightSource) -> None:
    """Fill this rank's model chunks in place; an error of one rank's is raised on all."""
    shards = shards_of(chunks)
    source.check(set().union(*gather_boxes(shards)))

    def fill_all() -> None:
        for shard in shards:
            source.fill(shard)

    on_every_rank(fill_all)


def on_every_rank(work: Callable[[], Any]) -> None:
    """Do this rank's work; where it is an error on one rank, raise it on all, or the others would wait."""
    failure = None
    try:
        work()
    except BridgeworksError as error:
        failure = error
    failures: list[BridgeworksError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    for rank, found in enumerate(failures):
        if found is not None:
            raise type(found)(f"rank {rank}: {found}" if len(failures) > 1 else str(found)) from failure


def export_hf_weights(
    chunks: Sequence[torch.nn.Module],
    provider: GPTModelProvider,
    *,
    names: Collection[str] | None = None,
    dtype: torch.dtype | None = None,
    cpu: bool = False,
    first_rank_only: bool = False,
    bucket_size: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every Hugging Face tensor whole, with its name, on every rank; all ranks must iterate together.

    `names` leaves out all others; `dtype` casts, before the transfer where that makes it smaller; with `cpu`
    the tensors end there. With `first_rank_only` the other ranks yield nothing. The order is the same on all
    ranks, but not that of the layers. Memory beside the model is `bucket_size` bytes (by default 64 MiB, on a
    GPU 512) and two of the largest tensor. A name that the model does not have, and a model that does not
    have what its family declares, are a CoverageError.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)  # else the optimizer's last step may still be under way
    plan, shards = plan_weights(provider), shards_of(chunks)
    held = gather_boxes(shards)
    check_model_coverage(blocks_by_tensor(plan), set().union(*held))
    if names is not None and (unknown := sorted(set(names) - plan.hf_shapes.keys())):
        raise CoverageError(
            f"the model has no tensor {unknown[0]!r}: names are those of Hugging Face's files"
        )
    wanted, replica = plan.hf_shapes if names is None else names, model_replica()
    if first_rank_only and 0 not in replica.ranks:
        return
    tensors = plan_pieces(plan, [held[rank] for rank in replica.ranks], wanted, dtype)
    gathering = Gathering(plan, tensors, {shard.box: shard.data for shard in shards}, dtype)
    size = bucket_size or (GPU_BUCKET_SIZE if device().type == "cuda" else CPU_BUCKET_SIZE)
    for name, weight in gathering.run(replica, size, first_rank_only):
        yield name, weight.cpu() if cpu else weight
