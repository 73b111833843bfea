"""Sizes in bytes as people write them."""

import re

from bridge.errors import ConfigError

Size = str | int
"""A number with a unit, or of bytes."""

SIZE_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def readable_size(nbytes: float) -> str:
    """Write a size in the largest unit of which it has one or more: 3.2 GB."""
    unit = next((unit for unit in ("TB", "GB", "MB") if nbytes >= SIZE_UNITS[unit]), "KB")
    return f"{nbytes / SIZE_UNITS[unit]:.1f} {unit}"


def parse_size(text: Size, setting: str) -> int:
    """Read a size such as "5GB", "200MiB" or 1000 in bytes; `setting` names it in errors."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    if not match or match[2].upper() not in SIZE_UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{setting} is {text!r}: give a number with one of {', '.join(SIZE_UNITS)[2:]}")
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])
