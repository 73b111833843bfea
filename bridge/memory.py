"""How much memory a conversion may take, and what follows for its buffers."""

import os
import re
import sys
from pathlib import Path

from bridge.errors import ConfigError
from bridge.sizes import Size, parse_size

DEFAULT_LIMIT = "1GiB"
# Of the interpreter and the command line, before a conversion begins.
INTERPRETER = 64 << 20
# A process that has torch loaded takes so much more when it ends: its libraries look at what they had.
END_OF_TORCH = 128 << 20
MIB = 1 << 20
MIN_BUFFER_SIZE = 16 << 10
# Working memory of a thread that computes; measured: larger parts are not faster.
MAX_PART_SIZE = 64 << 20
# Of Linux: sizes in pages, the second is what is resident; and a table of everything.
SIZES, STATUS = Path("/proc/self/statm"), Path("/proc/self/status")


class MemoryLimit:
    """The most that a process may have in memory because of one conversion that begins now.

    What the process had before counts as INTERPRETER, whatever it was: a process that has a model loaded can
    convert as well.
    """

    def __init__(self, limit: Size) -> None:
        self.limit = parse_size(limit, "max_memory")
        self._before, self._peak_before = resident_bytes(), peak_bytes()
        self._had_torch = "torch" in sys.modules

    def share(self, workers: int, least: int, most: int) -> tuple[int, int]:
        """Share what is left now between workers: return how many there can be and the bytes of each.

        Each gets between `least` and `most`; if not even one can have `least`, that is a ConfigError.
        """
        used = INTERPRETER + max(0, resident_bytes() - self._before)
        ending = END_OF_TORCH if "torch" in sys.modules and not self._had_torch else 0
        needed = max(used + max(least, ending), self._peak_until_now())
        if needed > self.limit:
            raise ConfigError(
                f"max_memory is {self.limit / MIB:.0f} MiB: the smallest that works for this model is"
                f" about {-(-needed // MIB)} MiB"
            )
        workers = min(workers, (self.limit - used) // least)
        return workers, min((self.limit - used) // workers, most)

    def _peak_until_now(self) -> int:
        """Importing torch may take more for a moment than it keeps."""
        peak = peak_bytes()
        return INTERPRETER + peak - self._before if peak > self._peak_before else 0


def peak_bytes() -> int:
    """Return the most that this process has had resident; 0 where the system does not say."""
    text = STATUS.read_text() if STATUS.is_file() else ""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def resident_bytes() -> int:
    """Return the memory that this process has resident now."""
    if SIZES.is_file():
        return int(SIZES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)
