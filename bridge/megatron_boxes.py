"""Hugging Face rows that cannot be copied as bytes, put together from a Megatron checkpoint by torch."""

import torch

from bridge.byte_copy import OpenFiles, crc32, read_into
from bridge.dtypes import ITEM_SIZES
from bridge.hf_rows import bytes_of, cast
from bridge.mapping import Block
from bridge.megatron_rows import Rows, check_rows
from bridge.torch_dist.checksums import ItemChecks


class RowAssembler:
    """Puts rows of one Hugging Face tensor together, in the orientation of its blocks.

    With `checks`, of which `read_rows` says more, all columns of a row must be asked for at once.
    """

    def __init__(self, name: str, dtype: str, files: OpenFiles, checks: ItemChecks | None) -> None:
        self._name = name
        self._dtype = dtype
        self._files = files
        self._checks = checks

    def box(self, parts: list[tuple[Block, Rows]], rows: range, columns: range) -> torch.Tensor:
        """Return rows and columns of the tensor as its blocks count them; `parts` cover all of the rows."""
        found = torch.empty((len(rows), len(columns)), dtype=getattr(torch, self._dtype))
        for block, stored in parts:
            first = max(0, -(-(rows.start - block.hf_row) // block.hf_step))
            last = min(block.rows, -(-(rows.stop - block.hf_row) // block.hf_step))
            if first < last:
                place = block.hf_row + first * block.hf_step - rows.start
                taken = range(block.megatron_row + first, block.megatron_row + last)
                read = read_box(stored, taken, columns, self._files, self._checks)
                found[place :: block.hf_step][: last - first] = cast(read, self._dtype, self._name)
        return found


def read_box(
    stored: Rows, rows: range, columns: range, files: OpenFiles, checks: ItemChecks | None
) -> torch.Tensor:
    """Return rows and columns of a stored Megatron tensor at one lead, whatever tiles it is cut into."""
    size = ITEM_SIZES[stored.dtype]
    found = torch.empty((len(rows), len(columns)), dtype=getattr(torch, stored.dtype))
    target, pitch = bytes_of(found), len(columns) * size
    for band in stored.bands:
        top, bottom = max(rows.start, band.row), min(rows.stop, band.row + band.num_rows)
        for tile in band.tiles if top < bottom else ():
            left = max(columns.start * size, tile.column)
            width = min(columns.stop * size, tile.column + tile.width) - left
            if width > 0:
                offset = tile.offset + (top - band.row) * tile.width + left - tile.column
                place = (top - rows.start) * pitch + left - columns.start * size
                whole = width == tile.width == pitch
                height, step = (1, (bottom - top) * width) if whole else (bottom - top, width)
                crc = 0
                with files.opened(tile.file) as descriptor:
                    for row in range(height):
                        view = target[place + row * pitch :][:step]
                        read_into(descriptor, [view], offset + row * tile.width)
                        crc = crc32(view, crc) if checks else 0
                if checks:
                    check_rows(checks, stored.key, band, tile, range(top, bottom), crc)
    return found
