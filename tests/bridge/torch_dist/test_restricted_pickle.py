"""Pickles made by hand: what they could do to this process or its memory is refused."""

import copyreg
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import CheckpointError
from bridge.torch_dist.items import TENSOR_GLOBALS
from bridge.torch_dist.metadata import METADATA_GLOBALS
from bridge.torch_dist.restricted_pickle import Inert, inert, read_pickle

ALL = {**METADATA_GLOBALS, **TENSOR_GLOBALS}


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def attributes(value: Any) -> dict[str, Any]:
    """Return everything that a stand-in is or has, down to a function's defaults."""
    names = ("__defaults__", "__kwdefaults__", "__doc__", "__name__", "__module__", "__dict__")
    return {name: repr(getattr(value, name, None)) for name in names}


STATES = {
    "attributes": b"}" + text("__doc__") + text("x") + b"s",
    "slots": b"N}" + text("__defaults__") + b"K\1\x85s" + text("__doc__") + text("x") + b"s\x86",
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ALL, ids=".".join)
def test_nothing_that_stands_for_a_name_can_be_changed(name: tuple[str, str], state: str) -> None:
    before = attributes(ALL[name])
    with pytest.raises(CheckpointError, match="malformed"):
        read_pickle(b"\x80\x02" + named(*name) + STATES[state] + b"b.", ALL, "x")
    assert attributes(ALL[name]) == before


def test_an_instance_takes_its_state() -> None:
    data = b"\x80\x02" + named("a", "B") + b")\x81" + STATES["attributes"] + b"b."
    found = read_pickle(data, {("a", "B"): inert("B")}, "x")
    assert isinstance(found, Inert)
    assert found.__doc__ == "x"


def test_functions_are_called() -> None:
    data = b"\x80\x02" + named("a", "f") + b"K\5\x85R."
    assert read_pickle(data, {("a", "f"): lambda number: number + 1}, "x") == 6


LENGTHS = {
    "memo index": b"\x80\x02Nr" + struct.pack("<I", 1 << 26) + b".",
    "memo index as text": b"\x80\x02Np67108864\n.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 33) + b".",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b".",
    "string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 33) + b".",
    "joined path": b"\x80\x02" + named("pathlib", "PosixPath") + b"q\0" + b"0" + text("x" * 60) + b"q\1"
    + b"0h\0h\1h\1\x86Rq\1" * 26 + b".",
}  # fmt: skip
PEAK = """
import resource, sys
from bridge.errors import CheckpointError
from bridge.torch_dist.metadata import METADATA_GLOBALS
from bridge.torch_dist.restricted_pickle import read_pickle
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_pickle(bytes.fromhex(sys.argv[1]), METADATA_GLOBALS, "x")
except CheckpointError as error:
    assert "malformed" in str(error), error
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("case", LENGTHS)
def test_a_few_bytes_take_little_memory(case: str) -> None:
    job = subprocess.run(
        [sys.executable, "-c", PEAK, LENGTHS[case].hex()],
        capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )  # fmt: skip
    assert int(job.stdout) < 8 << 10, "KiB"


def test_registered_extensions_are_not_taken_from_their_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(copyreg._extension_cache, 1, print)
    with pytest.raises(CheckpointError, match="EXT1"):
        read_pickle(b"\x80\x02\x82\x01.", {}, "x")


def test_nothing_else_unpickles() -> None:
    root = Path(__file__).parents[3]
    unpickling = re.compile(r"torch\.load\(|pickle\.loads?\(|Unpickler\(|allow_pickle=True|weights_only")
    found = {
        str(file.relative_to(root))
        for package in ("bridge", "training", "tasks", "flows", "recipes")
        for file in (root / package).rglob("*.py")
        if unpickling.search(file.read_text())
    }
    own_child = "training/checkpoint_writer.py"  # reads what its own fork wrote to a file without a name
    assert found == {"bridge/torch_dist/restricted_pickle.py", own_child}
