"""Loading of Megatron's distributed checkpoints without running code that may lie in them.

Megatron Core 0.16 unpickles `.metadata` and every stored object without restriction, and Transformer Engine
unpickles the `_extra_state` tensors that it is handed. `load` stands in for `dist_checkpointing.load`: the
metadata may hold only the classes that describe tensors, objects are loaded in torch's weights-only mode,
files lie inside the checkpoint's folder, and `_extra_state` is not read at all.
"""

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed._shard import sharded_tensor, sharding_spec
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from bridge.contained_path import contained_file
from bridge.errors import CheckpointError
from bridge.mapped_reader import MappedReader
from bridge.torch_dist.restricted_pickle import read_pickle

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
# the modules that hold the check of overlapping shards by its name
CHECKERS = (sharding_spec.api, sharded_tensor.api, sharded_tensor.utils)
DESCRIBING_CLASSES = {
    "torch": ("Size", "strided", *DTYPES),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    ),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": ("PosixPath", "PurePosixPath"),
}


def enum_member(kind: Any, name: str) -> Enum:
    """Stand for `getattr`, by which Python 3.11.2 (not 3.11.7) pickles the members of an enumeration."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise CheckpointError(".metadata asks for an attribute of something that is no enumeration")
    return kind[name]


ALLOWED_GLOBALS = {
    (module, name): getattr(import_module(module), name)
    for module, names in DESCRIBING_CLASSES.items()
    for name in names
} | {("builtins", "getattr"): enum_member}


def read_metadata(path: Path) -> Metadata:
    """Read the `.metadata` of the checkpoint at `path`; CheckpointError when it holds anything unexpected."""
    file = path / ".metadata"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    metadata = read_pickle(data, ALLOWED_GLOBALS, str(file))
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} holds a {type(metadata).__name__}, not the metadata of a checkpoint")
    for name in {item.relative_path for item in metadata.storage_data.values()}:
        contained_file(path, name, file)
    return metadata


class RestrictedReader(MappedReader):
    """A reader of checkpoint files that takes their metadata through a restricted unpickler."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._cached_metadata is None:
            metadata = read_metadata(Path(self.path))
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            self._cached_metadata = metadata
        return self._cached_metadata


class RestrictedPlanner(torch_strategy.MCoreLoadPlanner):
    """Megatron's load planner with objects limited to what torch calls weights."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        assert self.flatten_state_dict, "the default of torch's planner, which Megatron keeps"
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


class RestrictedCommonStrategy(TorchCommonLoadStrategy):
    """Megatron's reader of common.pt, limited also where TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return torch.load(Path(checkpoint_dir, COMMON_STATE_FNAME), map_location="cpu", weights_only=True)


@contextmanager
def restricted_readers() -> Iterator[None]:
    """Put the restricted reader and planner where Megatron's torch_dist strategy looks its own up.

    torch's check that no two shards overlap is left out: Megatron has just made them as a grid, and up to
    torch 2.13 it takes the square of their number, 11 of 20 seconds for 48 layers of 128 experts.
    """
    replaced: list[tuple[Any, str, Any]] = [
        (torch_strategy, "_get_filesystem_reader", lambda path, cache_metadata=False: RestrictedReader(path)),
        (torch_strategy, "MCoreLoadPlanner", RestrictedPlanner),
        *((module, "validate_non_overlapping_shards_metadata", lambda shards: None) for module in CHECKERS),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in originals:
            setattr(module, name, value)


def load(
    sharded_state_dict: dict[str, Any],
    path: Path | str,
    sharded_strategy: Any = None,
    strict: StrictHandling = StrictHandling.ASSUME_OK_UNEXPECTED,
) -> Any:
    """Do what `dist_checkpointing.load` does, without trusting the files; all ranks call it together."""
    if not Path(path, "metadata.json").is_file():
        raise CheckpointError(f"{path} has no metadata.json: not a Megatron checkpoint")
    try:
        with restricted_readers():
            return dist_checkpointing.load(
                without_extra_state(sharded_state_dict),
                str(path),
                sharded_strategy=sharded_strategy,
                common_strategy=RestrictedCommonStrategy(),
                strict=strict,
            )
    except (CheckpointException, CheckpointingException, pickle.UnpicklingError, OSError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {reason(error)}") from error


def load_common(path: Path | str) -> dict[str, Any]:
    """Return what a checkpoint holds beside its sharded tensors (common.pt)."""
    try:
        return RestrictedCommonStrategy().load_common(path)
    except (pickle.UnpicklingError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}/{COMMON_STATE_FNAME} cannot be loaded: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return one line: that of the first rank which failed, or the first that the error itself has."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = sorted(error.failures.items())[0]
        return f"rank {rank}: {reason(cause)}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def without_extra_state(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict without Transformer Engine's `_extra_state`, for loading and for saving.

    It is empty unless a run uses fp8, the local layers have none, and a checkpoint from another layer spec or
    from an import must not miss it.
    """

    def is_extra_state(value: Any) -> bool:
        return isinstance(value, ShardedObject) and "_extra_state" in value.key

    return extract_matching_values(sharded_state_dict, is_extra_state)[1]


def load_weights(module: torch.nn.Module, state_dict: dict[str, Any]) -> None:
    """Load a complete state dict (less `_extra_state`) into one unwrapped model chunk."""
    result = module.load_state_dict(state_dict, strict=False)
    missing = [name for name in result.missing_keys if "_extra_state" not in name]
    if missing or result.unexpected_keys:
        raise CheckpointError(f"weights missing {missing[:3]}, left over {list(result.unexpected_keys)[:3]}")
