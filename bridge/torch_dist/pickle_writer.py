"""Writes pickles that name classes of other packages without importing those packages."""

import struct
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple


class Global(NamedTuple):
    """A class, function or object by its module and name."""

    module: str
    name: str


class Call(NamedTuple):
    """The result of calling `function`; arguments must be hashable, equal calls share one object."""

    function: Global
    arguments: tuple[Any, ...]


class Instance(NamedTuple):
    """An object of class `type` made without its constructor and given `state`."""

    type: Global
    state: Any


class Pairs(NamedTuple):
    """A dictionary given as pairs, which are made when they are written: its keys may have no hash here."""

    items: Iterable[tuple[Any, Any]]


class Items(NamedTuple):
    """A list of what is made when it is written."""

    items: Iterable[Any]


class PersistentId(NamedTuple):
    """A reference that the reader resolves; torch's tensors refer to their storage so."""

    value: Any


def pickled(value: Any) -> bytes:
    """Return `value` as a pickle of protocol 2, the one that torch writes."""
    writer = _PickleWriter()
    writer.write(value)
    writer.out += b"."
    return bytes(writer.out)


class _PickleWriter:
    """Emits opcodes (CPython's pickletools.py documents them); strings, globals and calls are memoised."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[Any, int] = {}

    def write(self, value: Any) -> None:
        self.WRITERS[type(value)](self, value)

    def _write_none(self, value: None) -> None:
        self.out += b"N"

    def _write_bool(self, value: bool) -> None:
        self.out += b"\x88" if value else b"\x89"

    def _write_int(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += b"K%c" % value
        elif 0 <= value < 1 << 16:
            self.out += b"M" + struct.pack("<H", value)
        elif -1 << 31 <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            self.out += b"\x8a\x08" + struct.pack("<q", value)

    def _write_float(self, value: float) -> None:
        self.out += b"G" + struct.pack(">d", value)

    def _write_str(self, value: str) -> None:
        if not self._remembered(value):
            text = value.encode()
            self.out += b"X" + struct.pack("<I", len(text)) + text
            self._remember(value)

    def _write_tuple(self, value: tuple[Any, ...]) -> None:
        if len(value) > 3:
            self.out += b"("
        for item in value:
            self.write(item)
        self.out += (b")", b"\x85", b"\x86", b"\x87")[len(value)] if len(value) <= 3 else b"t"

    def _write_list(self, value: list[Any]) -> None:
        self._write_items(Items(value))

    def _write_items(self, value: Items) -> None:
        self.out += b"]("
        for item in value.items:
            self.write(item)
        self.out += b"e"

    def _write_dict(self, value: dict[Any, Any]) -> None:
        self._write_pairs(Pairs(value.items()))

    def _write_pairs(self, value: Pairs) -> None:
        self.out += b"}("
        for key, item in value.items:
            self.write(key)
            self.write(item)
        self.out += b"u"

    def _write_global(self, value: Global) -> None:
        if not self._remembered(value):
            self.out += f"c{value.module}\n{value.name}\n".encode()
            self._remember(value)

    def _write_call(self, value: Call) -> None:
        if not self._remembered(value):
            self.write(value.function)
            self.write(value.arguments)
            self.out += b"R"
            self._remember(value)

    def _write_instance(self, value: Instance) -> None:
        self.write(value.type)
        self.out += b")\x81"
        self.write(value.state)
        self.out += b"b"

    def _write_persistent_id(self, value: PersistentId) -> None:
        self.write(value.value)
        self.out += b"Q"

    def _remembered(self, value: Any) -> bool:
        slot = self.memo.get(value)
        if slot is None:
            return False
        self.out += b"h%c" % slot if slot < 256 else b"j" + struct.pack("<I", slot)
        return True

    def _remember(self, value: Any) -> None:
        slot = self.memo[value] = len(self.memo)
        self.out += b"q%c" % slot if slot < 256 else b"r" + struct.pack("<I", slot)

    WRITERS: ClassVar[dict[type, Callable[..., None]]] = {
        type(None): _write_none,
        bool: _write_bool,
        int: _write_int,
        float: _write_float,
        str: _write_str,
        tuple: _write_tuple,
        list: _write_list,
        dict: _write_dict,
        Pairs: _write_pairs,
        Items: _write_items,
        Global: _write_global,
        Call: _write_call,
        Instance: _write_instance,
        PersistentId: _write_persistent_id,
    }
