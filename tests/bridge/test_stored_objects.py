import io
import zipfile
from collections import OrderedDict
from typing import Any

import pytest
import torch

from bridge.errors import CheckpointError
from bridge.stored_objects import read_object
from bridge.torch_dist.items import object_item


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_reads_values_and_tensors_as_torch_does() -> None:
    matrix = torch.arange(12, dtype=torch.int64).reshape(3, 4)
    value = {
        "plain": [1, -2.5, None, True, "x", (3, {"y": 2**70})],
        "ordered": OrderedDict(a=1),
        "matrix": matrix,
        "a view": matrix[1:, ::2],
        "transposed": matrix.t(),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3, dtype=torch.uint8),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
    }
    found, expected = read_object(saved(value), "x"), torch.load(io.BytesIO(saved(value)), weights_only=True)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=0) if name != "plain" else None
    assert (found["plain"], found["ordered"]) == (value["plain"], {"a": 1})


def test_tensors_of_one_storage_share_it() -> None:
    whole = torch.zeros(4)
    first, second = read_object(saved([whole, whole[2:]]), "x")
    first[3] = 7
    assert second.tolist() == [0, 7]


def test_reads_what_a_conversion_wrote() -> None:
    assert read_object(object_item({"iteration": 0, "x": [1.5]}), "x") == {"iteration": 0, "x": [1.5]}


def rewritten(data: bytes, compression: int, **changes: bytes) -> bytes:
    """Return the archive compressed in another way, with other bytes in some entries."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            new.writestr(info.filename, changes.get(name, old.read(info)))
    return stream.getvalue()


ZEROS = saved(torch.zeros(1 << 16))
BAD = {
    "no archive": (b"hello", "damaged"),
    "no pickle": (b"PK\5\6" + bytes(18), "damaged"),
    "compressed": (rewritten(ZEROS, zipfile.ZIP_DEFLATED), "compressed"),
    "big-endian": (rewritten(ZEROS, zipfile.ZIP_STORED, byteorder=b"big"), "big-endian"),
    "too few bytes": (rewritten(ZEROS, zipfile.ZIP_STORED, **{"data/0": bytes(400)}), "malformed"),
    "a class": (saved(torch.Size([1])), "refers to torch.Size"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        read_object(data, "x")
