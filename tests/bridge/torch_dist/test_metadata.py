import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex

from bridge.errors import CheckpointError
from bridge.torch_dist.items import TensorItem
from bridge.torch_dist.metadata import (
    FORMAT,
    FORMAT_VALUES,
    METADATA,
    METADATA_GLOBALS,
    Chunk,
    Place,
    StoredTensor,
    TorchDistMetadata,
    read_metadata,
    write_metadata,
)
from bridge.torch_dist.restricted_pickle import read_pickle


def example() -> TorchDistMetadata:
    chunks = [
        Chunk((layer, 0), (1, 300), Place(f"__{layer % 2}_0.distcp", layer << 33, 900)) for layer in range(4)
    ]
    return TorchDistMetadata(
        tensors={"w": StoredTensor("bfloat16", (4, 300), chunks), "b": StoredTensor("float32", (), [])},
        objects={"w._extra_state/shard_0_4": Place("__0_0.distcp", 70000, 400)},
    )


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    write_metadata(tmp_path, example())
    assert read_metadata(tmp_path) == example()


def test_skips_keys(tmp_path: Path) -> None:
    write_metadata(tmp_path, example())
    found = read_metadata(tmp_path, skip=lambda key: key.startswith("w"))
    assert list(found.tensors) == ["b"]
    assert found.objects == {}


def test_torch_reads_what_it_wrote(tmp_path: Path) -> None:
    write_metadata(tmp_path, example())
    found = checkpoint.FileSystemReader(tmp_path).read_metadata()
    described = found.state_dict_metadata["w"]
    assert described.size == torch.Size((4, 300))
    assert described.properties.dtype == torch.bfloat16
    assert [chunk.offsets for chunk in described.chunks] == [torch.Size((layer, 0)) for layer in range(4)]
    info = found.storage_data[MetadataIndex("w", torch.Size((3, 0)))]
    assert (info.relative_path, info.offset, info.length) == ("__1_0.distcp", 3 << 33, 900)
    assert torch.load(tmp_path / "common.pt", weights_only=True)["iteration"] == 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_reads_what_torch_wrote(tmp_path: Path) -> None:
    checkpoint.save({"w": torch.zeros(3, 4), "o": {"n": 5}}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / FORMAT).write_text(json.dumps(FORMAT_VALUES))
    found = read_metadata(tmp_path)
    assert (found.tensors["w"].dtype, found.tensors["w"].shape) == ("float32", (3, 4))
    assert list(found.objects) == ["o.n"]


class Exploit:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("/tmp/bridgeworks-exploit",)


def truncate(folder: Path) -> None:
    (folder / METADATA).write_bytes((folder / METADATA).read_bytes()[:-30])


def link_outside(folder: Path) -> None:
    (folder / METADATA).rename(folder.parent / "elsewhere")
    (folder / METADATA).symlink_to(folder.parent / "elsewhere")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no format": (lambda f: (f / FORMAT).unlink(), "no Megatron distributed checkpoint"),
    "other format": (lambda f: (f / FORMAT).write_text('{"sharded_backend": "zarr"}'), "'zarr'"),
    "format is no object": (lambda f: (f / FORMAT).write_text("[]"), "only 'torch_dist'"),
    "code": (lambda f: (f / METADATA).write_bytes(pickle.dumps(Exploit())), "posix.mkdir"),
    "truncated": (truncate, "malformed"),
    "not a metadata": (lambda f: (f / METADATA).write_bytes(pickle.dumps({"a": 1})), "malformed"),
    "no pickle": (lambda f: (f / METADATA).write_bytes(b"hello"), "malformed"),
    "empty": (lambda f: (f / METADATA).write_bytes(b""), "malformed"),
    "a link outside": (link_outside, "is a link to"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str, tmp_path: Path) -> None:
    edit, message = BAD[case]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_metadata(folder, example())
    edit(folder)
    with pytest.raises(CheckpointError, match=message):
        read_metadata(folder)
    assert not Path("/tmp/bridgeworks-exploit").exists()


def test_refuses_a_chunk_without_file(tmp_path: Path) -> None:
    write_metadata(tmp_path, example())
    found = checkpoint.FileSystemReader(tmp_path).read_metadata()
    del found.storage_data[MetadataIndex("w", torch.Size((3, 0)))]
    (tmp_path / METADATA).write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match="a chunk of 'w' has no file"):
        read_metadata(tmp_path)


class Attribute:
    """Pickles as a call of `getattr`, as enumeration members do under Python 3.11.2."""

    def __init__(self, owner: Any, name: str) -> None:
        self.arguments = (owner, name)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, self.arguments


def test_getattr_reads_enumeration_members_and_nothing_else() -> None:
    name = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT.name
    data = pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, name))
    assert read_pickle(data, METADATA_GLOBALS, ".metadata") == name
    for owner, name in ((Metadata, "__init__"), (torch.Size, "__add__")):
        with pytest.raises(CheckpointError, match="no enumeration"):
            read_pickle(pickle.dumps(Attribute(owner, name)), METADATA_GLOBALS, ".metadata")


def test_many_chunks_take_little_memory(tmp_path: Path) -> None:
    """What is written for one is made when it is its turn: a large model has some 70,000."""
    count = 3000
    chunks = [Chunk((n, 0), (1, 64), Place(f"__{n % 8}_0.distcp", n << 20, 900)) for n in range(count)]
    metadata = TorchDistMetadata({"experts": StoredTensor("bfloat16", (count, 64), chunks)})
    tracemalloc.start()
    try:
        write_metadata(tmp_path, metadata)
        assert tracemalloc.get_traced_memory()[1] < 800 * count
        before, _ = tracemalloc.get_traced_memory()
        items = [TensorItem((1, 64), "bfloat16", n << 20) for n in range(count)]
        assert tracemalloc.get_traced_memory()[0] - before < 300 * len(items)
    finally:
        tracemalloc.stop()
