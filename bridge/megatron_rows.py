"""Rows of a stored Megatron tensor, whatever chunks training has cut it into."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import NamedTuple

from bridge.byte_copy import OpenFiles, crc32, read_into
from bridge.contained_path import contained_file
from bridge.dtypes import ITEM_SIZES
from bridge.errors import CheckpointError
from bridge.torch_dist.checksums import ItemChecks, Part
from bridge.torch_dist.items import Payload, locate_payload
from bridge.torch_dist.metadata import METADATA, Chunk, StoredTensor

Lead = tuple[int, ...]


class Tile(NamedTuple):
    """Bytes [column, column + width) of consecutive rows, contiguous at `offset` of `file`.

    `crc` is the CRC-32 that is stored for them; None if there is none.
    """

    column: int
    width: int
    file: Path
    offset: int
    crc: int | None


class Band(NamedTuple):
    """Consecutive rows and the tiles that make them up, from left to right.

    Tensor parallelism cuts the columns of a row-parallel weight: such a band has a tile for each rank.
    """

    row: int
    num_rows: int
    tiles: list[Tile]


class Rows(NamedTuple):
    """One tensor at one lead: bands from the first row to the last, `row_size` bytes a row."""

    row_size: int
    bands: list[Band]
    dtype: str
    key: str


class RowLocator:
    """Finds the rows of the tensors of one checkpoint folder."""

    def __init__(self, folder: Path, files: OpenFiles) -> None:
        self._folder = folder
        self._files = files
        self._paths: dict[str, Path] = {}

    def locate(self, key: str, tensor: StoredTensor, num_leads: int) -> dict[Lead, Rows]:
        """Return the rows at every lead of a tensor with `num_leads` leading axes.

        Chunks that do not make up the tensor, or whose bytes are not where they should be, are a
        CheckpointError.
        """
        tiles: dict[Lead, dict[tuple[int, int], list[Tile]]] = defaultdict(lambda: defaultdict(list))
        for chunk in tensor.chunks:
            box = _columns_of(key, tensor, chunk, num_leads)
            file, payload = self._payload(key, tensor.dtype, chunk)
            rows = (chunk.offsets[num_leads], chunk.sizes[num_leads])
            for number, lead in enumerate(leads := list(_leads_of(chunk, num_leads))):
                offset = payload.offset + number * rows[1] * box[1]
                tiles[lead][rows].append(Tile(*box, file, offset, payload.crc if len(leads) == 1 else None))
        num_rows = tensor.shape[num_leads]
        row_size = math.prod(tensor.shape[num_leads + 1 :]) * ITEM_SIZES[tensor.dtype]
        every_lead = itertools.product(*(range(size) for size in tensor.shape[:num_leads]))
        return {
            lead: Rows(
                row_size,
                _bands(f"{key!r} at {list(lead)}", tiles[lead], num_rows, row_size),
                tensor.dtype,
                key,
            )
            for lead in every_lead
        }

    def _payload(self, key: str, dtype: str, chunk: Chunk) -> tuple[Path, Payload]:
        name, start, length = chunk.place
        if name not in self._paths:
            self._paths[name] = contained_file(self._folder, name, self._folder / METADATA)
        file = self._paths[name]
        with self._files.opened(file) as descriptor:
            payload = locate_payload(descriptor, start, length, chunk.sizes, str(file))
        if payload.dtype != dtype:
            raise CheckpointError(f"{file} holds {key!r} in {payload.dtype}, .metadata says {dtype}")
        return file, payload


def _columns_of(key: str, tensor: StoredTensor, chunk: Chunk, num_leads: int) -> tuple[int, int]:
    """Return the first byte and the number of bytes that a chunk has of each row."""
    boxes = list(zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True))
    inner = tensor.shape[num_leads + 2 :]
    inside = all(offset >= 0 and offset + size <= whole for offset, size, whole in boxes)
    if not inside or chunk.sizes[num_leads + 2 :] != inner:
        raise CheckpointError(
            f".metadata has a chunk of {key!r} at {list(chunk.offsets)} of size {list(chunk.sizes)}, which"
            f" does not fit the shape {list(tensor.shape)}"
        )
    column, width, _ = boxes[num_leads + 1] if len(boxes) > num_leads + 1 else (0, 1, 1)
    unit = math.prod(inner) * ITEM_SIZES[tensor.dtype]
    return column * unit, width * unit


def _leads_of(chunk: Chunk, num_leads: int) -> Iterator[Lead]:
    """Yield the leads that a chunk holds, in the order of its bytes."""
    boxes = list(zip(chunk.offsets, chunk.sizes, strict=True))[:num_leads]
    return itertools.product(*(range(offset, offset + size) for offset, size in boxes))


def _bands(what: str, tiles: dict[tuple[int, int], list[Tile]], num_rows: int, row_size: int) -> list[Band]:
    bands = [Band(row, count, sorted(tiles[row, count])) for row, count in sorted(tiles)]
    next_row = 0
    for band in bands:
        ends = list(itertools.accumulate((tile.width for tile in band.tiles), initial=0))
        if band.row != next_row or ends != [*(tile.column for tile in band.tiles), row_size]:
            raise CheckpointError(f"the chunks of {what} overlap or leave a gap around row {next_row}")
        next_row += band.num_rows
    if next_row != num_rows:
        raise CheckpointError(f"the chunks of {what} end at row {next_row} of {num_rows}")
    return bands


def read_rows(
    rows: Rows,
    first: int,
    count: int,
    files: OpenFiles,
    buffer: memoryview,
    checks: ItemChecks | None = None,
) -> Iterator[memoryview]:
    """Yield the bytes of rows [first, first + count) in order; each view is valid until the next.

    With `checks`, to which each row may go once, items that are read to their last row are held against the
    CRC-32 that is stored with them.
    """
    for band in rows.bands:
        begin, end = max(first, band.row), min(first + count, band.row + band.num_rows)
        crcs = [0] * len(band.tiles) if checks else []
        if begin < end and len(band.tiles) > 1:
            skip = begin - band.row
            yield from _read_tiled(rows.row_size, band.tiles, skip, end - begin, files, buffer, crcs)
        elif begin < end:
            tile = band.tiles[0]
            for view in _read_whole(rows.row_size, tile, begin - band.row, end - begin, files, buffer):
                if crcs:
                    crcs[0] = crc32(view, crcs[0])
                yield view
        if checks and begin < end:
            for tile, crc in zip(band.tiles, crcs, strict=True):
                check_rows(checks, rows.key, band, tile, range(begin, end), crc)


def check_rows(checks: ItemChecks, key: str, band: Band, tile: Tile, rows: range, crc: int) -> None:
    """Add what was read of a tile, all of some rows, to the checks of its item, if that has a CRC-32."""
    if tile.crc is not None:
        item, size = f"{tile.file}, {key!r} at byte {tile.offset}", tile.width
        begin = (rows.start - band.row) * size
        checks.add(Part(item, band.num_rows * size, tile.crc, begin, len(rows) * size), crc)


def _read_whole(
    row_size: int, tile: Tile, skip: int, count: int, files: OpenFiles, buffer: memoryview
) -> Iterator[memoryview]:
    start, end = (tile.offset + row * row_size for row in (skip, skip + count))
    with files.opened(tile.file) as descriptor:
        size = len(buffer)
        for offset in range(start, end, size):
            view = buffer if offset + size <= end else buffer[: end - offset]
            read_into(descriptor, [view], offset)
            yield view


def _continued(crc: int, view: memoryview) -> int:
    return crc32(view, crc)


def _read_tiled(
    row_size: int,
    tiles: list[Tile],
    skip: int,
    count: int,
    files: OpenFiles,
    buffer: memoryview,
    crcs: list[int],
) -> Iterator[memoryview]:
    """Read each tile's rows straight to their places between those of the other tiles.

    `crcs`, unless it is empty, has the CRC-32 of what was read of each.
    """
    step = min(count, max(1, len(buffer) // row_size))
    if row_size > len(buffer):
        buffer = memoryview(bytearray(row_size))
    places = [[buffer[r * row_size + t.column :][: t.width] for r in range(step)] for t in tiles]
    for row in range(skip, skip + count, step):
        num_rows = min(step, skip + count - row)
        for number, (tile, views) in enumerate(zip(tiles, places, strict=True)):
            with files.opened(tile.file) as descriptor:
                read_into(descriptor, views[:num_rows], tile.offset + row * tile.width)
            if crcs:
                crcs[number] = reduce(_continued, views[:num_rows], crcs[number])
        yield buffer[: num_rows * row_size]
