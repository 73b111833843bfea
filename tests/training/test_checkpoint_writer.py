import os
import zlib

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from training.checkpoint_writer import Results, write_file


def test_a_file_is_on_the_disk_and_its_digest_is_that_of_its_bytes(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    tensors = {"small": torch.arange(3), "large": torch.randn(700, 100), "part": torch.arange(90)[7:19]}
    items = [(WriteItem(MetadataIndex(name), WriteItemType.TENSOR), t) for name, t in tensors.items()]
    path = tmp_path / "__0_0.distcp"
    places, crc = write_file([_StorageWriterTransforms()], (str(path), path.name, ([], items)))
    assert crc == zlib.crc32(path.read_bytes())
    assert sizes == [path.stat().st_size]
    assert [place.index.fqn for place in places] == list(tensors)
    # what is a part of a larger buffer is written alone
    assert places[2].size_in_bytes < 2000


@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_writer_that_is_killed_on_its_last_words_is_an_error(kept):
    results = Results()
    results.put(({0: list(range(10_000))}, {"__0_0.distcp": 17}))
    assert results.get_nowait() == {0: list(range(10_000))}
    assert results.crcs == {"__0_0.distcp": 17}
    results._file.truncate(int(kept * results._file.tell()))
    answer = results.get_nowait()
    assert isinstance(answer, RuntimeError)
    assert "was killed" in str(answer)
