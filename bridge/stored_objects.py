"""Objects that `torch.save` wrote: numbers, strings, containers and tensors are read back, and nothing else.

torch's own weights-only mode also makes and changes objects of all classes that were ever registered with it,
and Megatron Core registers enumerations, of which a file could then change the members.
"""

import io
import zipfile
from typing import Any

import torch

from bridge.dtypes import FROM_STORAGE
from bridge.errors import CheckpointError
from bridge.torch_dist.items import DAMAGED
from bridge.torch_dist.restricted_pickle import Globals, read_pickle


def read_object(data: bytes, source: str) -> Any:
    """Read the object that a file holds, its tensors on the CPU; CheckpointError when it is anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return read_pickle(*_parts(archive, len(data), source), source)
    except DAMAGED as error:
        raise CheckpointError(f"{source} is damaged: {error}") from error


def _parts(archive: zipfile.ZipFile, size: int, source: str) -> tuple[bytes, Globals]:
    """Return the archive's pickle and what stands for the names in it."""
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if sum(info.file_size for info in entries.values()) > size:
        raise CheckpointError(f"{source} is compressed: only what torch.save wrote is read")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise CheckpointError(f"{source} is big-endian: save it on a common machine")
    return archive.read(entries["data.pkl"]), _object_globals(_Storages(archive, entries))


def _object_globals(storages: "_Storages") -> Globals:
    return {
        ("torch._utils", "_rebuild_tensor_v2"): storages.tensor,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("collections", "OrderedDict"): dict,
        **{("torch", storage): dtype for storage, dtype in FROM_STORAGE.items()},
    }


class _Storages:
    """The storages of an archive, each read once however many tensors it has."""

    def __init__(self, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> None:
        self.archive, self.entries = archive, entries
        self.elements: dict[str, torch.Tensor] = {}

    def tensor(self, storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> torch.Tensor:
        _, dtype, key, *_ = storage
        if key not in self.elements:
            data = bytearray(self.archive.read(self.entries[f"data/{key}"]))
            kind = getattr(torch, dtype)
            self.elements[key] = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
        return self.elements[key].as_strided(shape, strides, offset)
