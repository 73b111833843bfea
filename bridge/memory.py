"""How much memory a conversion may take, and what follows for its buffers."""

import os
from pathlib import Path

from bridge.errors import ConfigError
from bridge.sizes import parse_size

DEFAULT_LIMIT = "1GiB"
# Of the interpreter and the command line, before a conversion begins.
INTERPRETER = 64 << 20
MIB = 1 << 20
MIN_BUFFER_SIZE = 16 << 10
# Working memory of a thread that computes; measured: larger parts are not faster.
MAX_PART_SIZE = 64 << 20
STATUS = Path("/proc/self/statm")  # of Linux: sizes in pages, the second is what is resident


class MemoryLimit:
    """The most that a process may have in memory because of one conversion that begins now.

    What the process had before counts as INTERPRETER, whatever it was: a process that has a model loaded can
    convert as well.
    """

    def __init__(self, limit: str) -> None:
        self.limit = parse_size(limit, "max_memory")
        self._before = resident_bytes()

    def share(self, workers: int, least: int, most: int) -> tuple[int, int]:
        """Share what is left now between workers: return how many there can be and the bytes of each.

        Each gets between `least` and `most`; if not even one can have `least`, that is a ConfigError.
        """
        used = INTERPRETER + max(0, resident_bytes() - self._before)
        if used + least > self.limit:
            needed = -(-(used + least) // MIB)
            raise ConfigError(
                f"max_memory is {self.limit / MIB:.0f} MiB: the smallest that works for this model is"
                f" about {needed} MiB"
            )
        workers = min(workers, (self.limit - used) // least)
        return workers, min((self.limit - used) // workers, most)


def resident_bytes() -> int:
    """Return the memory that this process has resident now."""
    if STATUS.is_file():
        return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)
