"""Makes the tensors of a sharded model whole, bucket by bucket, within each copy of the model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from bridge.distributed import device
from bridge.gather_plan import Buckets, Part, Piece, dtype_of
from bridge.hf_rows import cast
from bridge.mapping import WeightPlan
from bridge.shards import Box, part_of, rows_of_block

Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class Replica:
    """The ranks that hold one copy of the model between them, this one among them."""

    group: torch.distributed.ProcessGroup | None
    ranks: list[int]


def model_replica() -> Replica:
    """Return the smallest of Megatron's groups that holds a copy of the model.

    That is the model-parallel group; with experts theirs, if it contains the former; else all ranks.
    """
    groups = (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    )
    dense, experts = (torch.distributed.get_process_group_ranks(group) for group in groups)
    everywhere: list[tuple[list[int], list[int]]] = [([], [])] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, (dense, experts))
    if all(set(inner) <= set(outer) for outer, inner in everywhere):
        return Replica(groups[0], dense)
    if all(set(inner) <= set(outer) for inner, outer in everywhere):
        return Replica(groups[1], experts)
    return Replica(None, list(range(torch.distributed.get_world_size())))


class Gathering:
    """The pieces of the tensors, and those tensors that are not yet complete."""

    def __init__(
        self,
        plan: WeightPlan,
        tensors: dict[str, list[Piece]],
        own: dict[Box, torch.Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        self._plan = plan
        self._names = list(tensors)
        self._pieces = list(tensors.values())
        self._own = own
        self._dtypes = [dtype_of(pieces, dtype) for pieces in self._pieces]
        self._missing = [sum(piece.num_elements for piece in pieces) for pieces in self._pieces]
        self._open: dict[int, torch.Tensor] = {}

    def check_casts(self, replica: Replica) -> None:
        """Raise CoverageError if a value that this rank is to send overflows in its tensor's dtype."""
        rank = replica.ranks.index(torch.distributed.get_rank())
        for name, pieces, dtype in zip(self._names, self._pieces, self._dtypes, strict=True):
            for piece in pieces:
                if piece.owner == rank and piece.box.dtype != dtype:
                    cast(rows_of_piece(self._own, piece), str(dtype).removeprefix("torch."), name)

    def run(self, replica: Replica, bucket_size: int, first_rank_only: bool) -> Iterator[Named]:
        """Yield the tensors as they become complete."""
        if len(replica.ranks) == 1:
            for tensor, pieces in enumerate(self._pieces):
                for piece in pieces:
                    yield from self._put(tensor, piece, rows_of_piece(self._own, piece))
            return
        half = bucket_size // 2
        wire = Wire(replica, first_rank_only)
        for parts in Buckets(self._pieces, len(replica.ranks), half // len(replica.ranks), half):
            sent = wire.buffer(wire.rank, max(part.size for part in parts))
            for _, piece, offset in parts[wire.rank].placed:
                view(sent, piece, offset).copy_(rows_of_piece(self._own, piece))
            received = wire.exchange(sent, [part.size for part in parts])
            yield from self._unpack(parts, received) if received else ()

    def _unpack(self, parts: list[Part], received: list[torch.Tensor]) -> Iterator[Named]:
        placed = sorted(
            (tensor, rank, offset, piece)
            for rank, part in enumerate(parts)
            for tensor, piece, offset in part.placed
        )
        for tensor, rank, offset, piece in placed:
            yield from self._put(tensor, piece, view(received[rank], piece, offset))

    def _put(self, tensor: int, piece: Piece, rows: torch.Tensor) -> Iterator[Named]:
        """Put rows where they belong; yield their tensor if it is complete."""
        if tensor not in self._open:
            shape = self._plan.hf_shapes[self._names[tensor]]
            self._open[tensor] = torch.empty(shape, dtype=self._dtypes[tensor], device=rows.device)
        target_of_piece(self._open[tensor], self._plan, piece).copy_(rows)
        self._missing[tensor] -= piece.num_elements
        if self._missing[tensor] == 0:
            yield self._names[tensor], self._open.pop(tensor)


def rows_of_piece(own: dict[Box, torch.Tensor], piece: Piece) -> torch.Tensor:
    """Return the rows of a piece in this rank's own part of the model."""
    first = piece.box.offsets[0]
    return own[piece.box][piece.first - first : piece.last - first]


def target_of_piece(tensor: torch.Tensor, plan: WeightPlan, piece: Piece) -> torch.Tensor:
    """Return where a piece belongs in its whole Hugging Face tensor."""
    offsets = (piece.first - piece.block.megatron_row, *piece.box.offsets[1:])
    return part_of(rows_of_block(tensor, plan, piece.block), offsets, piece.shape)


def view(part: torch.Tensor, piece: Piece, offset: int) -> torch.Tensor:
    """Return a piece's bytes in a part of a bucket as its rows."""
    return part[offset : offset + piece.nbytes].view(piece.dtype).view(piece.shape)


class Wire:
    """The collectives of one replica, with buffers that every bucket uses again."""

    def __init__(self, replica: Replica, first_rank_only: bool) -> None:
        self.rank = replica.ranks.index(torch.distributed.get_rank())
        self._ranks = replica.ranks
        self._group = replica.group
        self._first_rank_only = first_rank_only
        self._buffers: dict[int, torch.Tensor] = {}

    def buffer(self, rank: int, size: int) -> torch.Tensor:
        """Return the buffer for the part of a rank of the replica; rank -1 stands for all."""
        if rank not in self._buffers or self._buffers[rank].numel() < size:
            self._buffers[rank] = torch.empty(size, dtype=torch.uint8, device=device())
        return self._buffers[rank][:size]

    def exchange(self, sent: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        """Return what each rank sent, at least `sizes` bytes; nothing on ranks that get nothing.

        `sent` has the greatest of the sizes on every rank. NCCL moves the parts of all ranks at once; gloo is
        slow at that (measured: a fifth of its speed at broadcasts).
        """
        if device().type == "cuda":
            return self._gather_to_first(sent) if self._first_rank_only else self._gather(sent)
        return self._send_to_first(sent, sizes) if self._first_rank_only else self._broadcast(sent, sizes)

    def _gather(self, sent: torch.Tensor) -> list[torch.Tensor]:
        received = self.buffer(-1, len(self._ranks) * sent.numel())
        torch.distributed.all_gather_into_tensor(received, sent, group=self._group)
        return list(received.view(len(self._ranks), -1))

    def _gather_to_first(self, sent: torch.Tensor) -> list[torch.Tensor]:
        received: list[torch.Tensor] = []
        if torch.distributed.get_rank() == 0:
            received = list(self.buffer(-1, len(self._ranks) * sent.numel()).view(len(self._ranks), -1))
        torch.distributed.gather(sent, received or None, dst=0, group=self._group)
        return received

    def _broadcast(self, sent: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        received = [self.buffer(rank, size) for rank, size in enumerate(sizes)]
        under_way = [
            torch.distributed.broadcast(part, src=self._ranks[rank], group=self._group, async_op=True)
            for rank, part in enumerate(received)
            if part.numel()
        ]
        for work in under_way:
            work.wait()
        return received

    def _send_to_first(self, sent: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        if torch.distributed.get_rank() != 0:
            if sizes[self.rank]:
                torch.distributed.send(sent[: sizes[self.rank]], dst=0, group=self._group)
            return []
        received = [self.buffer(rank, size) for rank, size in enumerate(sizes)]
        under_way = [
            torch.distributed.irecv(part, src=self._ranks[rank], group=self._group)
            for rank, part in enumerate(received)
            if part.numel() and rank != self.rank
        ]
        for work in under_way:
            work.wait()
        return received
