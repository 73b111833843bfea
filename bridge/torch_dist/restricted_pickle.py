"""Reads the pickles of a checkpoint: no global is imported, an allow-list says what stands for it."""

import io
import pickle
from collections.abc import Mapping
from typing import Any, ClassVar

from bridge.errors import CheckpointError

Globals = Mapping[tuple[str, str], Any]
"""What stands for a (module, name): a class, a function, or a constant."""


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


def read_pickle(data: bytes, allowed: Globals, source: str) -> Any:
    """Unpickle `data` with the globals of `allowed` alone; `source` names the file in errors."""
    try:
        return _RestrictedUnpickler(data, allowed, source).load()
    except CheckpointError:
        raise
    except Exception as error:  # a malformed pickle can raise nearly anything
        raise CheckpointError(f"{source} is malformed: {type(error).__name__}: {error}") from error


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
        return self.allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid
