"""Weights between a live, sharded model and a Hugging Face checkpoint, by the plan of conversions on disk.

Nothing here knows about tensor or pipeline parallelism: each rank's `ShardedTensor`s say which box of which
global tensor it holds.
"""

from collections.abc import Collection, Iterator, Sequence, Set
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel

from bridge.agreement import is_first_rank, on_every_rank
from bridge.byte_copy import OpenFiles, Progress, ProgressCounter
from bridge.distributed import device
from bridge.errors import CoverageError
from bridge.families import plan_weights
from bridge.gather_plan import dtype_of, plan_pieces
from bridge.gathering import Gathering, model_replica
from bridge.hf_checkpoint import HfCheckpoint
from bridge.hf_writer import TensorDescription, write_shards
from bridge.live_vocabulary import check_same_vocabulary, noted_vocab_size, num_rows
from bridge.mapping import WeightPlan
from bridge.progress_bar import progress_bar
from bridge.provider import GPTModelProvider
from bridge.shards import blocks_by_tensor, check_model_coverage, gather_boxes, shards_of
from bridge.sizes import Size
from bridge.weight_sources import HfSource, WeightSource

CPU_BUCKET_SIZE = 64 << 20
GPU_BUCKET_SIZE = 512 << 20


def load_hf_weights(
    chunks: Sequence[torch.nn.Module], provider: GPTModelProvider, checkpoint: HfCheckpoint
) -> None:
    """Fill this rank's model chunks with its own slices of a Hugging Face checkpoint, cast to their dtype."""
    with OpenFiles() as files:
        fill(chunks, HfSource(plan_weights(provider), checkpoint, files))


def fill(chunks: Sequence[torch.nn.Module], source: WeightSource) -> None:
    """Fill this rank's model chunks in place; an error of one rank's is raised on all."""
    shards = shards_of(chunks)
    source.check(set().union(*gather_boxes(shards)), noted_vocab_size(chunks))

    def fill_all() -> None:
        for shard in shards:
            source.fill(shard)
            if shard.data.dtype is torch.float16 and shard.data.isinf().any():
                raise CoverageError(
                    f"{shard.box.key!r} holds values that overflow in float16: choose bfloat16"
                )

    on_every_rank(fill_all)


class HfWeights:
    """The Hugging Face tensors of a live model: described at once, made whole when iterated over.

    For the meaning of the options see `export_hf_weights`.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        provider: GPTModelProvider,
        *,
        names: Collection[str] | None = None,
        dtype: torch.dtype | None = None,
        first_rank_only: bool = False,
        bucket_size: int | None = None,
    ) -> None:
        finish_updates(chunks)
        plan, shards = plan_weights(provider), shards_of(chunks)
        held = gather_boxes(shards)
        boxes = set().union(*held)
        check_model_coverage(blocks_by_tensor(plan), boxes)
        noted = noted_vocab_size(chunks)
        check_same_vocabulary(noted, num_rows(boxes), provider.vocab_size, "the config to export it with")
        known = plan.hf_shapes.keys() | plan.copies
        wanted = known if names is None else set(names)
        if unknown := sorted(wanted - known):
            raise CoverageError(f"the model has no tensor {unknown[0]!r}: names are those of Hugging Face")
        self._replica = model_replica()
        self._names = names_by_tensor(plan, wanted)
        pieces = plan_pieces(plan, [held[rank] for rank in self._replica.ranks], self._names, dtype)
        self._gathering = Gathering(plan, pieces, {shard.box: shard.data for shard in shards}, dtype)
        self._first_rank_only = first_rank_only
        self._bucket_size = bucket_size or (GPU_BUCKET_SIZE if device().type == "cuda" else CPU_BUCKET_SIZE)
        self.described = {
            name: TensorDescription(
                plan.hf_shapes[tensor], str(dtype_of(parts, dtype)).removeprefix("torch.")
            )
            for tensor, parts in pieces.items()
            for name in self._names[tensor]
        }
        """Every tensor in the order of the model's rules, which is not that in which they come."""
        # before anything is sent: a rank that then stopped would leave the others waiting
        on_every_rank(lambda: self._gathering.check_casts(self._replica))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.described.values())

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._first_rank_only and 0 not in self._replica.ranks:
            return
        for tensor, weight in self._gathering.run(self._replica, self._bucket_size, self._first_rank_only):
            for name in self._names[tensor]:
                yield name, weight


def write_weights(
    weights: HfWeights, folder: Path, max_shard_size: Size = "5GB", progress: Progress | None = None
) -> None:
    """Write a model's tensors as safetensors shards, by the first rank; an error of it is raised on all."""

    def write() -> None:
        arriving = iter(weights)
        try:
            if is_first_rank():
                with progress_bar("saving", progress) as report:
                    counter = ProgressCounter(weights.nbytes, report)
                    write_shards(folder, arriving, weights.described, max_shard_size, counter)
        finally:
            # Every rank has its part in gathering: also after an error of the first one they go on sending.
            for _ in arriving:
                pass

    on_every_rank(write)


def names_by_tensor(plan: WeightPlan, wanted: Set[str]) -> dict[str, list[str]]:
    """Return the wanted names of each tensor: its own, and those of its copies."""
    names = {name: [name] for name in plan.hf_shapes if name in wanted}
    for copy in sorted(plan.copies & wanted):
        names.setdefault(plan.tied[copy], []).append(copy)
    return names


def finish_updates(chunks: Sequence[torch.nn.Module]) -> None:
    """Wait for what the optimizer's last step may still be sending."""
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


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

    `names` leaves out all others; `dtype` casts all but those that Megatron keeps in float32, before the
    transfer where that makes it smaller; with `cpu` the tensors end there. With `first_rank_only` the other
    ranks yield nothing. The order is the same on all ranks, but not that of the layers. Memory beside the
    model is `bucket_size` bytes (by default 64 MiB, on a GPU 512) and two of the largest tensor. A name that
    the model does not have, a model that does not have what its family declares, and a value that overflows
    in `dtype` are a CoverageError.
    """
    weights = HfWeights(
        chunks, provider, names=names, dtype=dtype, first_rank_only=first_rank_only, bucket_size=bucket_size
    )
    return ((name, weight.cpu() if cpu else weight) for name, weight in weights)
