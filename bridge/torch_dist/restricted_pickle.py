"""Reads the pickles of a checkpoint: no global is imported, an allow-list says what stands for it.

What stands for a class or a function cannot be changed by a pickle, so that nothing outlives its reading; and
no index or length in it takes memory for bytes that it does not have.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from bridge.errors import CheckpointError

Globals = Mapping[tuple[str, str], Any]
"""What stands for a (module, name): a class below `Inert`, dict, a function, or a string."""

PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
EXTENSIONS = ("EXT1", "EXT2", "EXT4")


class Inert:
    """Stands for an object of a class that is not imported: it has attributes and does nothing."""

    type_name: ClassVar[str] = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state


def inert(name: str) -> type[Inert]:
    """Return a class of its own that stands for the class `name`."""
    return type(name, (Inert,), {"type_name": name})


class _Called:
    """Stands for a function, which has attributes that a pickle could set: this one can only be called."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it gives a function a state")


def read_pickle(data: bytes, allowed: Globals, source: str) -> Any:
    """Unpickle `data` with the globals of `allowed` alone; `source` names the file in errors."""
    try:
        _check_opcodes(data)
        return _RestrictedUnpickler(data, allowed, source).load()
    except CheckpointError:
        raise
    except Exception as error:  # a malformed pickle can raise nearly anything
        raise CheckpointError(f"{source} is malformed: {type(error).__name__}: {error}") from error


def _check_opcodes(data: bytes) -> None:
    """Raise a ValueError for lengths beyond the data and for what the C unpickler would do unasked.

    It makes its memo as long as the largest index, and takes extensions from a cache instead of `find_class`.
    """
    remembered = 0
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in PUTS:
            if argument > remembered:  # picklers number consecutively
                raise ValueError(f"entry {argument} of its memo comes after {remembered} others")
            remembered += 1
        elif opcode.name == "MEMOIZE":
            remembered += 1
        elif opcode.name in EXTENSIONS:
            raise ValueError(f"it has the opcode {opcode.name}")


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Globals, source: str) -> None:
        super().__init__(io.BytesIO(data))
        self.allowed = allowed
        self.source = source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise CheckpointError(
                f"{self.source} refers to {module}.{name}, which a checkpoint has no use for:"
                " it may be an attack and was not run"
            )
        stand_in = self.allowed[module, name]
        return stand_in if isinstance(stand_in, str | type) else _Called(stand_in)

    def persistent_load(self, pid: Any) -> Any:
        return pid
