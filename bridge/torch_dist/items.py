"""Items of a .distcp file: each is a tensor or an object as `torch.save` writes it, a zip archive of its own.

The archive's entries are stored, not compressed, so a tensor's bytes lie in one piece and can be written and
found without torch.
"""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, NamedTuple

from bridge.dtypes import FROM_STORAGE, ITEM_SIZES, TO_STORAGE
from bridge.errors import CheckpointError
from bridge.torch_dist.pickle_writer import Call, Global, PersistentId, pickled
from bridge.torch_dist.restricted_pickle import read_pickle

ALIGNMENT = 64  # of a payload, as torch.save aligns it
MAX_PAYLOAD = 2**32 - 2**16  # above it a zip archive needs the 64-bit format, which is not written here
DESCRIBING = ("data.pkl", "byteorder")
MAX_DESCRIPTION = 1 << 20  # a pickled tensor description is some 200 bytes

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
END_OF_DIRECTORY = struct.Struct("<4s4H2IH")
ZIP_VERSION, UTF8_NAMES = 20, 0x800
# What zipfile raises where bytes are not those of an archive.
DAMAGED = (
    zipfile.BadZipFile,
    KeyError,
    OSError,
    struct.error,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,
)
PADDING_FIELD = b"FB"  # the extra field that torch pads payloads with


class _Entry(NamedTuple):
    name: bytes
    crc: int
    size: int
    offset: int


class _Frame(NamedTuple):
    """What the items of all tensors of one shape and dtype have in common; `payload` lacks the CRC-32."""

    head: bytes
    entries: tuple[_Entry, ...]
    payload: _Entry
    tail_size: int


class TensorItem(NamedTuple):
    """The framing of one tensor's payload: where the item lies and the bytes before and after the payload.

    It begins at byte `start` of its file. A large model has very many: what can be computed is not kept.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def payload_start(self) -> int:
        return self._unpadded + -self._unpadded % ALIGNMENT

    @property
    def end(self) -> int:
        frame = _frame(self.shape, self.dtype)
        return self.payload_start + frame.payload.size + frame.tail_size

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def _unpadded(self) -> int:
        head, _, payload, _ = _frame(self.shape, self.dtype)
        return self.start + len(head) + LOCAL_HEADER.size + len(payload.name) + 4

    def head(self, crc: int) -> bytes:
        """Return the bytes from `start` to `payload_start`; `crc` is the payload's CRC-32."""
        head, _, payload, _ = _frame(self.shape, self.dtype)
        padding = self.payload_start - self._unpadded
        extra = PADDING_FIELD + struct.pack("<H", padding) + bytes(padding)
        return head + _local_header(payload._replace(crc=crc), extra)

    def tail(self, crc: int) -> bytes:
        """Return the bytes from the payload's end to `end`."""
        _, entries, payload, _ = _frame(self.shape, self.dtype)
        return _tail(entries, payload._replace(crc=crc), self.payload_start - self.start)


@cache  # a model has few shapes and, with experts, very many tensors
def _frame(shape: tuple[int, ...], dtype: str) -> _Frame:
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    assert nbytes <= MAX_PAYLOAD, f"{nbytes} bytes in one item: split the tensor into chunks"
    entries: list[_Entry] = []
    head = b""
    for name, data in (("data.pkl", _describe(shape, dtype)), ("byteorder", b"little")):
        entry = _Entry(f"archive/{name}".encode(), zlib.crc32(data), len(data), len(head))
        head += _local_header(entry) + data
        entries.append(entry)
    payload = _Entry(b"archive/data/0", 0, nbytes, len(head))
    return _Frame(head, tuple(entries), payload, len(_tail(entries, payload, 0)))


def _tail(entries: Iterable[_Entry], payload: _Entry, payload_offset: int) -> bytes:
    data = b"3\n"  # the version of torch's archive format
    offset = payload_offset + payload.size
    version = _Entry(b"archive/version", zlib.crc32(data), len(data), offset)
    last = _local_header(version) + data
    return last + _directory([*entries, payload, version], offset + len(last))


def _describe(shape: tuple[int, ...], dtype: str) -> bytes:
    """Pickle a contiguous tensor as torch does: a call that rebuilds it from the storage named "0"."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = PersistentId(("storage", Global("torch", TO_STORAGE[dtype]), "0", "cpu", math.prod(shape)))
    hooks = Call(Global("collections", "OrderedDict"), ())
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return pickled(Call(rebuild, (storage, 0, shape, strides, False, hooks)))


def _local_header(entry: _Entry, extra: bytes = b"") -> bytes:
    sizes = (entry.crc, entry.size, entry.size, len(entry.name), len(extra))
    return LOCAL_HEADER.pack(b"PK\3\4", ZIP_VERSION, UTF8_NAMES, 0, 0, 0, *sizes) + entry.name + extra


def _directory(entries: list[_Entry], offset: int) -> bytes:
    records = b"".join(
        CENTRAL_HEADER.pack(
            b"PK\1\2", ZIP_VERSION, ZIP_VERSION, UTF8_NAMES, 0, 0, 0,
            entry.crc, entry.size, entry.size, len(entry.name), 0, 0, 0, 0, 0, entry.offset,
        )
        + entry.name
        for entry in entries
    )  # fmt: skip
    return records + END_OF_DIRECTORY.pack(
        b"PK\5\6", 0, 0, len(entries), len(entries), len(records), offset, 0
    )


def object_item(value: Any) -> bytes:
    """Return plain Python values (numbers, strings, containers) as `torch.save` writes them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("data.pkl", pickled(value)), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return stream.getvalue()


class Payload(NamedTuple):
    """Where a stored tensor's contiguous, little-endian bytes begin in their file, and their dtype.

    `crc` is the CRC-32 that is stored for just these bytes; None if there is none.
    """

    offset: int
    dtype: str
    crc: int | None = None


def locate_payload(fd: int, start: int, length: int, shape: tuple[int, ...], source: str) -> Payload:
    """Find the bytes of the tensor stored in [start, start + length) of an open file.

    A tensor of another shape, not contiguous, compressed, big-endian or out of bounds is a CheckpointError.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_FileRange(fd, start, length), 4096)) as archive:
            return _locate(archive, fd, start, length, shape, source)
    except DAMAGED as error:
        raise CheckpointError(f"{source}: the item at byte {start} is damaged: {error}") from error


def _locate(
    archive: zipfile.ZipFile, fd: int, start: int, length: int, shape: tuple[int, ...], source: str
) -> Payload:
    names = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    for info in names.values():
        # torch.serialization.set_crc32_options(False) stores zeros; zipfile checks nothing where it has None.
        info.CRC = info.CRC or None  # type: ignore[assignment]
    if max((names[name].file_size for name in DESCRIBING if name in names), default=0) > MAX_DESCRIPTION:
        raise CheckpointError(f"{source}: the item at byte {start} is no plain tensor")
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise CheckpointError(
            f"{source}: the item at byte {start} is big-endian: save it on a common machine"
        )
    try:
        tensor = _description(archive.read(names["data.pkl"]))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    if not isinstance(tensor, _StoredTensor):
        raise CheckpointError(f"{source}: the item at byte {start} is no tensor")
    _check_contiguous(tensor, shape, f"{source}: the item at byte {start}")
    dtype = FROM_STORAGE[tensor.storage_type]
    info, item_size = names[f"data/{tensor.storage_key}"], ITEM_SIZES[dtype]
    begin, nbytes = tensor.storage_offset * item_size, math.prod(shape) * item_size
    header = os.pread(fd, LOCAL_HEADER.size, start + info.header_offset)
    name_size, extra_size = LOCAL_HEADER.unpack(header)[-2:]
    offset = info.header_offset + LOCAL_HEADER.size + name_size + extra_size + begin
    stored = info.compress_type == zipfile.ZIP_STORED and begin + nbytes <= info.file_size
    if not stored or begin < 0 or offset + nbytes > length:
        raise CheckpointError(f"{source}: the payload of the item at byte {start} is compressed or too short")
    return Payload(start + offset, dtype, info.CRC if nbytes == info.file_size else None)


@lru_cache(64)  # a model has few shapes and, with experts, very many tensors
def _description(data: bytes) -> Any:
    return read_pickle(data, TENSOR_GLOBALS, "data.pkl")


def _check_contiguous(tensor: "_StoredTensor", shape: tuple[int, ...], item: str) -> None:
    if tensor.shape != shape:
        raise CheckpointError(f"{item} has shape {list(tensor.shape)}, .metadata says {list(shape)}")
    expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if any(a != b for a, b, size in zip(tensor.strides, expected, shape, strict=True) if size > 1):
        raise CheckpointError(f"{item} is not contiguous (strides {list(tensor.strides)})")


class _StoredTensor(NamedTuple):
    storage_type: str
    storage_key: str
    storage_offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> _StoredTensor:
    _, storage_type, key, *_ = storage
    return _StoredTensor(storage_type(), str(key), int(offset), tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _constant(value: str) -> Any:
    return lambda: value


TENSOR_GLOBALS = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): dict,
    **{("torch", storage): _constant(storage) for storage in FROM_STORAGE},
}


class _FileRange(io.RawIOBase):
    """A read-only stream over part of an open file; it has a position of its own."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self.fd, self.start, self.length, self.position = fd, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = origin + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.position)]
        count = os.preadv(self.fd, [view], self.start + self.position)
        self.position += count
        return count
