"""What a `torch_dist` checkpoint says about itself, read and written without torch.

`.metadata` is a pickled `torch.distributed.checkpoint.metadata.Metadata`: for each tensor its global shape
and chunks, for each chunk the file and the bytes that hold it. `metadata.json` names the format, `common.pt`
holds what all ranks share.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bridge.contained_path import contained_file
from bridge.dtypes import ITEM_SIZES
from bridge.errors import CheckpointError
from bridge.torch_dist.items import object_item
from bridge.torch_dist.pickle_writer import Call, Global, Instance, Items, Pairs, pickled
from bridge.torch_dist.restricted_pickle import Globals, Inert, inert, read_pickle

METADATA = ".metadata"
FORMAT = "metadata.json"
SHARED_OBJECT = "common.pt"
# megatron/core/dist_checkpointing/core.py, CheckpointingConfig
FORMAT_VALUES = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

DCP = "torch.distributed.checkpoint"
ENUMERATIONS = ("_MEM_FORMAT_ENCODING", "WriteItemType")
MAX_PATH = 4096  # PATH_MAX of Linux; joined paths could double at every step


class Place(NamedTuple):
    """The item at bytes [start, start + length) of a file of the checkpoint's folder."""

    file: str
    start: int
    length: int


class Chunk(NamedTuple):
    """A box of a global tensor, and the item that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass
class StoredTensor:
    """A global tensor and the chunks that make it up."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)


@dataclass
class TorchDistMetadata:
    """Tensors and objects of a checkpoint by their keys."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    objects: dict[str, Place] = field(default_factory=dict)


def write_metadata(folder: Path, metadata: TorchDistMetadata) -> None:
    """Write the three files that make `folder` a checkpoint for Megatron, `.metadata` last."""
    (folder / FORMAT).write_text(json.dumps(FORMAT_VALUES))
    content = {"singleton_local_shards": False}  # layers are an axis of each tensor, as Megatron saves them
    shared = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}
    (folder / SHARED_OBJECT).write_bytes(object_item(shared))
    (folder / METADATA).write_bytes(pickled(_metadata_object(metadata)))


def _metadata_object(metadata: TorchDistMetadata) -> Instance:
    nothing: dict[str, Any] = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
    state = {
        "state_dict_metadata": Pairs(_described(metadata)),
        "planner_data": {},
        "storage_data": Pairs(_stored(metadata)),
        "storage_meta": _instance("metadata", "StorageMeta", nothing),
        "version": "1.0.0",
    }
    return _instance("metadata", "Metadata", state)


def _described(metadata: TorchDistMetadata) -> Iterator[tuple[str, Instance]]:
    for key, tensor in metadata.tensors.items():
        yield key, _tensor_object(tensor)
    for key in metadata.objects:
        yield key, _instance("metadata", "BytesStorageMetadata", {})


def _stored(metadata: TorchDistMetadata) -> Iterator[tuple[Instance, Instance]]:
    for key, tensor in metadata.tensors.items():
        for number, chunk in enumerate(tensor.chunks):
            yield _index_object(key, _size(chunk.offsets), number), _place_object(chunk.place)
    for key, place in metadata.objects.items():
        yield _index_object(key, None, None), _place_object(place)


def _tensor_object(tensor: StoredTensor) -> Instance:
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Global(f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"), (0,))
    # dtype, layout, requires_grad, memory format, pin_memory
    properties = (Global("torch", tensor.dtype), layout, False, contiguous, False)
    state = {
        "properties": _instance("metadata", "TensorProperties", properties),
        "size": _size(tensor.shape),
        "chunks": Items(map(_chunk_object, tensor.chunks)),
    }
    return _instance("metadata", "TensorStorageMetadata", state)


def _chunk_object(chunk: Chunk) -> Instance:
    boxes = {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)}
    return _instance("metadata", "ChunkStorageMetadata", boxes)


def _index_object(key: str, offset: Call | None, number: int | None) -> Instance:
    return _instance("metadata", "MetadataIndex", {"fqn": key, "index": number, "offset": offset})


def _place_object(place: Place) -> Instance:
    state = {"relative_path": place.file, "offset": place.start, "length": place.length}
    return _instance("filesystem", "_StorageInfo", state)


def _size(shape: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (shape,))


def _instance(module: str, name: str, state: Any) -> Instance:
    return Instance(Global(f"{DCP}.{module}", name), state)


def read_metadata(folder: Path, skip: Callable[[str], bool] = lambda key: False) -> TorchDistMetadata:
    """Read what `folder` holds, without the keys that `skip` says; anything wrong is a CheckpointError."""
    _check_format(folder)
    file = contained_file(folder, METADATA, folder)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    found = read_pickle(data, METADATA_GLOBALS, str(file))
    try:
        return _read_metadata_object(found, skip)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{file} is malformed: {type(error).__name__}: {error}") from error


def _check_format(folder: Path) -> None:
    file = folder / FORMAT
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no Megatron distributed checkpoint: {FORMAT}: {error}") from error
    backend = found.get("sharded_backend") if isinstance(found, dict) else None
    if backend != FORMAT_VALUES["sharded_backend"]:
        raise CheckpointError(f"{file} has sharded_backend {backend!r}: only 'torch_dist' is read")


def _read_metadata_object(found: Any, skip: Callable[[str], bool]) -> TorchDistMetadata:
    metadata = TorchDistMetadata()
    boxes: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}
    for key, described in found.state_dict_metadata.items():
        if described.type_name == "TensorStorageMetadata" and not skip(key):
            dtype = described.properties.state[0].removeprefix("torch.")
            rank = len(described.size)
            metadata.tensors[key] = StoredTensor(dtype, _sized(described.size, rank))
            boxes[key] = {_sized(c.offsets, rank): _sized(c.sizes, rank) for c in described.chunks}
    for index, info in found.storage_data.items():
        key, place = index.fqn, _read_place(info)
        if key in boxes:
            sizes = boxes[key].pop(index.offset)
            metadata.tensors[key].chunks.append(Chunk(index.offset, sizes, place))
        elif found.state_dict_metadata[key].type_name == "BytesStorageMetadata" and not skip(key):
            metadata.objects[key] = place
    if unplaced := [key for key, left in boxes.items() if left]:
        raise ValueError(f"a chunk of {unplaced[0]!r} has no file")
    return metadata


def _sized(found: Any, rank: int) -> tuple[int, ...]:
    if not isinstance(found, tuple) or len(found) != rank or not all(type(each) is int for each in found):
        raise ValueError(f"{found} is no size of {rank} axes")
    return found


def _read_place(info: Any) -> Place:
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{info.relative_path} is transformed ({info.transform_descriptors})")
    place = Place(str(info.relative_path), int(info.offset), int(info.length))
    if place.start < 0 or place.length < 0:
        raise ValueError(f"an item of {place.file} has {place.length} bytes from {place.start} on")
    return place


def _size_read(shape: Any = ()) -> tuple[int, ...]:
    return tuple(int(size) for size in shape)


def _first_argument(value: Any, *_: Any) -> Any:
    return value


def _path_read(*parts: str) -> str:
    if sum(map(len, parts)) > MAX_PATH:
        raise ValueError(f"a path has more than {MAX_PATH} characters")
    return "/".join(parts)


def _enum_member(kind: Any, name: str) -> str:
    """Stand for `getattr`, by which Python 3.11.2 (not 3.11.7) pickles the members of an enumeration."""
    if not (isinstance(kind, type) and issubclass(kind, Inert) and kind.type_name in ENUMERATIONS):
        raise CheckpointError(".metadata asks for an attribute of something that is no enumeration")
    return name


def _metadata_globals() -> Globals:
    """Everything that torch 2.6 to 2.15 and Megatron Core 0.13 to 0.16 write into `.metadata`."""
    classes = {
        f"{DCP}.metadata": (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        f"{DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
        f"{DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
        "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    }
    allowed: dict[tuple[str, str], Any] = {
        (module, name): inert(name) for module, names in classes.items() for name in names
    }
    allowed |= {("torch", dtype): f"torch.{dtype}" for dtype in ITEM_SIZES}
    paths = [
        (module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")
    ]
    allowed |= dict.fromkeys(paths, _path_read)
    return allowed | {
        ("torch", "Size"): _size_read,
        ("torch", "strided"): "torch.strided",
        ("torch.serialization", "_get_layout"): _first_argument,
        ("builtins", "getattr"): _enum_member,
        ("collections", "OrderedDict"): dict,
    }


METADATA_GLOBALS = _metadata_globals()
