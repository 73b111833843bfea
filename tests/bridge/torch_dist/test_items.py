import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from bridge.errors import CheckpointError
from bridge.torch_dist.items import TensorItem, locate_payload, object_item

SHAPES = [(), (5,), (3, 4), (1, 7, 300), (2, 1, 1, 70000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def payload(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def saved(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def locate(path: Path, content: bytes, shape: tuple[int, ...], start: int = 0, length: int | None = None):
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = len(content) - start if length is None else length
        return locate_payload(descriptor, start, size, shape, str(path))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_loads_an_item(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    item = TensorItem(shape, str(dtype).removeprefix("torch."), start=192)
    data = payload(tensor)
    crc = zlib.crc32(data)
    content = item.head(crc) + data + item.tail(crc)
    assert len(content) == item.length
    assert item.payload_start % 64 == 0
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_locates_what_torch_saved(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(shape).to(dtype)
    content = b"before" + saved(tensor)
    found = locate(tmp_path / "item", content, shape, start=6)
    data = payload(tensor)
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert content[found.offset : found.offset + len(data)] == data


def test_locates_a_view_and_a_parameter(tmp_path: Path) -> None:
    whole = torch.randn(10, 4)
    for tensor in (whole[3:5], torch.nn.Parameter(whole[3:5])):
        content = saved(tensor)
        found = locate(tmp_path / "item", content, (2, 4))
        assert content[found.offset : found.offset + 32] == payload(whole[3:5])


class Exploit:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("/tmp/bridgeworks-exploit",)


def with_entry(content: bytes, name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Replace one entry of an archive."""
    source, stream = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for info in source.infolist():
            replaced = info.filename.endswith(f"/{name}")
            archive.writestr(info.filename, data if replaced else source.read(info), compression)
    return stream.getvalue()


GOOD = saved(torch.zeros(4, 6))
OURS = TensorItem((4, 6), "float32", 0).head(0) + bytes(96) + TensorItem((4, 6), "float32", 0).tail(0)
BAD_ITEMS = {
    "no archive": (b"nothing" * 20, "damaged"),
    "empty": (b"", "damaged"),
    "truncated": (GOOD[:-40], "damaged"),
    "other shape": (saved(torch.zeros(6, 4)), "has shape"),
    "transposed": (saved(torch.zeros(6, 4).T), "not contiguous"),
    "an object": (saved({"a": 1}), "no tensor"),
    "code": (with_entry(GOOD, "data.pkl", pickle.dumps(Exploit(), 2)), "posix.mkdir"),
    "half a pickle": (with_entry(GOOD, "data.pkl", b"\x80\x02c"), "malformed"),
    "big-endian": (with_entry(GOOD, "byteorder", b"big"), "big-endian"),
    "long description": (with_entry(GOOD, "byteorder", bytes(2 << 20)), "no plain tensor"),
    "compressed": (with_entry(GOOD, "none", b"", zipfile.ZIP_DEFLATED), "compressed or too short"),
    "short payload": (with_entry(GOOD, "data/0", bytes(90)), "compressed or too short"),
    "name of no text": (b"\xaf".join(OURS.rsplit(b"/", 1)), "damaged"),
    "no payload": (with_entry(GOOD, "data/0", b"").replace(b"data/0", b"data/9"), "damaged"),
}


@pytest.mark.parametrize("case", BAD_ITEMS)
def test_refuses(case: str, tmp_path: Path) -> None:
    content, message = BAD_ITEMS[case]
    with pytest.raises(CheckpointError, match=message):
        locate(tmp_path / "item", content, (4, 6))
    assert not Path("/tmp/bridgeworks-exploit").exists()


def test_objects_are_read_by_torch() -> None:
    value = {"a": [1, 2.5, None, True, False, -5, 300, 70000, 2**40], "b": (1, 2, 3, 4), "c": {}, "d": ()}
    assert torch.load(io.BytesIO(object_item(value)), weights_only=True) == value


@pytest.mark.parametrize("stored", [True, False])
def test_items_without_checksums_are_read(stored: bool, tmp_path: Path) -> None:
    """As torch writes them after `set_crc32_options(False)`: with zeros."""
    tensor = torch.randn(3, 4)
    torch.serialization.set_crc32_options(stored)
    try:
        content = saved(tensor)
    finally:
        torch.serialization.set_crc32_options(True)
    found = locate(tmp_path / "item", content, (3, 4))
    assert content[found.offset :][:48] == payload(tensor)
    assert found.crc == (zlib.crc32(payload(tensor)) if stored else None)
    part = locate(tmp_path / "item", saved(tensor[1:]), (2, 4))  # torch stores all of the tensor
    assert part.crc is None
