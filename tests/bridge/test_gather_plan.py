import math

import pytest
import torch

from bridge.errors import CoverageError
from bridge.gather_plan import Buckets, Piece, plan_pieces
from bridge.mapping import Block, WeightPlan
from bridge.shards import Box

COLUMNS = 8
ROW_SIZE = COLUMNS * 2


def plan_of(tensors: int, rows: int) -> WeightPlan:
    plan = WeightPlan()
    for number in range(tensors):
        plan.blocks.append(Block(f"hf.{number}", 0, rows, f"key.{number}", (), 0))
        plan.hf_shapes[f"hf.{number}"] = plan.megatron_shapes[f"key.{number}"] = (rows, COLUMNS)
    return plan


def box(number: int, first: int, rows: int) -> Box:
    return Box(f"key.{number}", (), (first, 0), (rows, COLUMNS), torch.bfloat16)


def split(plan: WeightPlan, ranks: int) -> list[set[Box]]:
    """Cut every tensor by rows, as tensor parallelism does."""
    shapes = enumerate(plan.hf_shapes.values())
    boxes = [
        (rank, box(n, rank * rows // ranks, rows // ranks))
        for n, (rows, _) in shapes
        for rank in range(ranks)
    ]
    return [{part for owner, part in boxes if owner == rank} for rank in range(ranks)]


def staged(plan: WeightPlan, ranks: int) -> list[set[Box]]:
    """Give every rank whole tensors, as pipeline parallelism does."""
    shapes = list(plan.hf_shapes.values())
    part = len(shapes) // ranks
    return [{box(n, 0, shapes[n][0]) for n in range(rank * part, (rank + 1) * part)} for rank in range(ranks)]


@pytest.mark.parametrize("layout", [split, staged])
@pytest.mark.parametrize("rows", [4, 64])  # 64: a tensor is larger than a part
def test_buckets_hold_every_row_once_within_their_sizes(layout, rows: int) -> None:
    plan, part_size = plan_of(12, rows), 20 * ROW_SIZE
    tensors = list(plan_pieces(plan, layout(plan, 2), plan.hf_shapes).values())
    sent: set[tuple[str, int]] = set()
    for parts in Buckets(tensors, 2, part_size, open_size=0):
        assert all(part.size <= part_size + ROW_SIZE for part in parts)
        for rank, part in enumerate(parts):
            for _, piece, _ in part.placed:
                assert piece.owner == rank
                found = {(piece.block.hf, row) for row in range(piece.first, piece.last)}
                assert not found & sent
                sent |= found
    assert len(sent) == 12 * rows


def test_ranks_of_a_pipeline_send_at_the_same_time() -> None:
    plan = plan_of(12, 8)
    tensors = list(plan_pieces(plan, staged(plan, 2), plan.hf_shapes).values())
    for parts in Buckets(tensors, 2, 16 * ROW_SIZE, open_size=10**9):
        assert parts[0].size == parts[1].size


@pytest.mark.parametrize("open_size", [0, 3 * 8 * ROW_SIZE])
def test_few_tensors_are_incomplete(open_size: int) -> None:
    """The first rank has three quarters of the first tensors, the second of the last: one runs ahead."""
    plan = plan_of(16, 8)
    cuts = [6] * 8 + [2] * 8
    held = [
        {box(n, 0, cut) for n, cut in enumerate(cuts)},
        {box(n, cut, 8 - cut) for n, cut in enumerate(cuts)},
    ]
    tensors = list(plan_pieces(plan, held, plan.hf_shapes).values())
    missing = dict.fromkeys(range(16), 8)
    for parts in Buckets(tensors, 2, 7 * ROW_SIZE, open_size):
        for part in parts:
            for tensor, piece, _ in part.placed:
                missing[tensor] -= piece.last - piece.first
        incomplete = sum(0 < rows < 8 for rows in missing.values())
        assert incomplete <= max(2, open_size // (8 * ROW_SIZE) + 1)
    assert not any(missing.values())


def test_replicas_share_the_work() -> None:
    plan = plan_of(10, 4)
    everything = {box(n, 0, 4) for n in range(10)}
    pieces = plan_pieces(plan, [everything, everything], plan.hf_shapes)
    assert [part.owner for parts in pieces.values() for part in parts] == [0, 1] * 5


def test_a_smaller_dtype_is_the_one_that_travels() -> None:
    plan = plan_of(1, 4)
    for wanted, travels in ((torch.float32, torch.bfloat16), (torch.float8_e5m2, torch.float8_e5m2)):
        (piece,) = plan_pieces(plan, [{box(0, 0, 4)}], plan.hf_shapes, wanted)["hf.0"]
        assert piece.dtype == travels
        assert piece.nbytes == math.prod(piece.shape) * travels.itemsize


@pytest.mark.parametrize("held", [[box(0, 0, 3)], [box(0, 0, 3), box(0, 2, 2)]])
def test_boxes_that_do_not_make_up_a_tensor_are_refused(held: list[Box]) -> None:
    with pytest.raises(CoverageError, match=r"elements of 'hf\.0', which has 32"):
        plan_pieces(plan_of(1, 4), [set(held)], ["hf.0"])


def test_pieces_are_split_by_rows() -> None:
    (piece,) = plan_pieces(plan_of(1, 4), [{box(0, 0, 4)}], ["hf.0"])["hf.0"]
    head, tail = piece.split(1)
    assert isinstance(head, Piece)
    assert isinstance(tail, Piece)
    assert (head.first, head.last, tail.first, tail.last) == (0, 1, 1, 4)
    assert piece.split(9) == (piece, None)
    assert piece.split(0) == (None, piece)
