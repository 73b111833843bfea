"""Holds what is read of a checkpoint's items, in any order, against the CRC-32 that they are stored with."""

import threading
from functools import lru_cache
from typing import NamedTuple

from bridge.errors import CheckpointError

# CRC-32 as zip archives have it (PKZIP's APPNOTE 4.4.7): polynomials over GF(2), of which the highest bit is
# the lowest power.
POLYNOMIAL = 0xEDB88320
ONE = 1 << 31


class Part(NamedTuple):
    """Bytes [begin, begin + nbytes) of an item's payload of `size` bytes, whose stored CRC-32 is `stored`."""

    item: str
    size: int
    stored: int
    begin: int
    nbytes: int


class ItemChecks:
    """Adds up the CRC-32 of items from parts that several threads read; each byte must be read once."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def add(self, part: Part, crc: int) -> None:
        """Add a part with its own CRC-32; if the item is complete and has another one, a CheckpointError."""
        moved = followed_by(crc, part.size - part.begin - part.nbytes)
        with self._lock:
            read, total = self._begun.pop(part.item, (0, 0))
            read, total = read + part.nbytes, total ^ moved
            if read < part.size:
                self._begun[part.item] = read, total
        if read >= part.size and total != part.stored:
            raise CheckpointError(
                f"{part.item}: its bytes have CRC-32 {total:08x}, stored with them is {part.stored:08x}:"
                " the file was damaged, copy it again"
            )


def followed_by(crc: int, nbytes: int) -> int:
    """Return what bytes of this CRC-32 contribute to that of a text in which `nbytes` bytes follow them.

    The CRC-32 of the text is the sum, by exclusive or, of what its parts contribute (zlib's crc32_combine).
    """
    return _multiply(crc, _power(nbytes)) if crc else 0


@lru_cache(1 << 14)  # the same distances come again in every layer
def _power(nbytes: int) -> int:
    """Return x to the power of 8 * nbytes, modulo the polynomial."""
    if nbytes == 0:
        return ONE
    half = _power(nbytes // 2)
    square = _multiply(half, half)
    return _multiply(square, ONE >> 8) if nbytes % 2 else square


def _multiply(a: int, b: int) -> int:
    product = 0
    while a:
        if a & ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ POLYNOMIAL if b & 1 else b >> 1
    return product
