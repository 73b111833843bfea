"""Loading of Megatron's distributed checkpoints without running code that may lie in them.

Megatron Core 0.16 unpickles `.metadata` and every stored object without restriction, and Transformer Engine
unpickles the `_extra_state` tensors that it is handed. `load` stands in for `dist_checkpointing.load`: the
metadata is built anew from what its inert reading says, objects are numbers, strings, containers and tensors,
files lie inside the checkpoint's folder, and `_extra_state` is not read at all.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed._shard import sharded_tensor, sharding_spec
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from bridge.contained_path import contained_file
from bridge.errors import CheckpointError
from bridge.mapped_reader import MappedReader
from bridge.stored_objects import read_object
from bridge.torch_dist import metadata as torch_dist

# the modules that hold the check of overlapping shards by its name
CHECKERS = (sharding_spec.api, sharded_tensor.api, sharded_tensor.utils)


def read_metadata(path: Path) -> Metadata:
    """Describe the checkpoint at `path` to torch; what it cannot be is a CheckpointError."""
    found = torch_dist.read_metadata(path)
    places = {
        MetadataIndex(key, chunk.offsets, number): chunk.place
        for key, tensor in found.tensors.items()
        for number, chunk in enumerate(tensor.chunks)
    } | {MetadataIndex(key): place for key, place in found.objects.items()}
    for name in {place.file for place in places.values()}:
        contained_file(path, name, path / torch_dist.METADATA)
    tensors = {key: _tensor_metadata(tensor) for key, tensor in found.tensors.items()}
    objects = {key: BytesStorageMetadata() for key in found.objects}
    return Metadata(
        {**tensors, **objects}, storage_data={index: _StorageInfo(*place) for index, place in places.items()}
    )


def _tensor_metadata(tensor: torch_dist.StoredTensor) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(torch.Size(each.offsets), torch.Size(each.sizes)) for each in tensor.chunks
    ]
    properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
    return TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)


class RestrictedReader(MappedReader):
    """A reader of checkpoint files that trusts nothing of their metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._cached_metadata is None:
            metadata = read_metadata(Path(self.path))
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            self._cached_metadata = metadata
        return self._cached_metadata


class RestrictedPlanner(torch_strategy.MCoreLoadPlanner):
    """Megatron's load planner with objects limited to plain values and tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        assert self.flatten_state_dict, "the default of torch's planner, which Megatron keeps"
        path = self.mappings[read_item.dest_index.fqn]
        source = f"the object {read_item.storage_index.fqn!r}"
        set_element(self.original_state_dict, path, read_object(value.getvalue(), source))


class RestrictedCommonStrategy(TorchCommonLoadStrategy):
    """Megatron's reader of common.pt, limited in the same way."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return load_common(checkpoint_dir)


class NoCommonStrategy(TorchCommonLoadStrategy):
    """Leaves out common.pt, in which plain Megatron-LM keeps objects of many classes."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return {}


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
    *,
    common: bool = True,
) -> Any:
    """Do what `dist_checkpointing.load` does, without trusting the files; all ranks call it together.

    What all ranks share (common.pt) is left out unless `common`.
    """
    if not Path(path, "metadata.json").is_file():
        raise CheckpointError(f"{path} has no metadata.json: not a Megatron checkpoint")
    try:
        with restricted_readers():
            return dist_checkpointing.load(
                without_extra_state(sharded_state_dict),
                str(path),
                sharded_strategy=sharded_strategy,
                common_strategy=RestrictedCommonStrategy() if common else NoCommonStrategy(),
                strict=strict,
            )
    except (CheckpointException, CheckpointingException, OSError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {reason(error)}") from error


def load_common(path: Path | str) -> dict[str, Any]:
    """Return what a checkpoint holds beside its sharded tensors (common.pt)."""
    file = contained_file(Path(path), torch_dist.SHARED_OBJECT, Path(path))
    found = read_object(file.read_bytes(), str(file))
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, not a state dict")
    return found


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
