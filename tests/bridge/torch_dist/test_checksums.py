"""CRC-32 of items from parts in any order."""

import itertools
import os
import random
import zlib

import pytest

from bridge.errors import CheckpointError
from bridge.torch_dist.checksums import ItemChecks, Part


@pytest.mark.parametrize("size", [1, 5, 70_001])
def test_parts_in_any_order_add_up(size: int) -> None:
    data = os.urandom(size)
    cuts = [0, *sorted(random.sample(range(1, size), min(4, size - 1))), size]
    parts = list(itertools.pairwise(cuts))
    for stored in (zlib.crc32(data), zlib.crc32(data) ^ 1 << 7):
        checks = ItemChecks()
        *others, last = random.sample(parts, len(parts))
        for begin, end in others:
            checks.add(Part("it", size, stored, begin, end - begin), zlib.crc32(data[begin:end]))
        begin, end = last
        part = Part("it", size, stored, begin, end - begin)
        if stored == zlib.crc32(data):
            checks.add(part, zlib.crc32(data[begin:end]))
        else:
            with pytest.raises(CheckpointError, match="it: its bytes have CRC-32"):
                checks.add(part, zlib.crc32(data[begin:end]))
