"""The `.distcp` files of an import: where each chunk lies in them, and their writing."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bridge.byte_copy import (
    MAPPED_SIZE,
    OpenFiles,
    ProgressCounter,
    copy_range,
    crc32,
    for_each,
    reserve,
    write_from,
)
from bridge.chunk_plan import ByteRange, HfRows, Piece
from bridge.memory import MAX_PART_SIZE, MemoryLimit
from bridge.quantization import HfTensor
from bridge.staging import Journal
from bridge.torch_dist.items import ALIGNMENT, TensorItem
from bridge.torch_dist.metadata import Chunk, Place, TorchDistMetadata


class ItemFile(NamedTuple):
    """A file to be: its pieces, and where each one's item lies."""

    name: str
    items: list[tuple[Piece, TensorItem]]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece, _ in self.items)


def file_name(number: int) -> str:
    """Name a file as Megatron names those of rank `number`."""
    return f"__{number}_0.distcp"


def lay_out(number: int, pieces: list[Piece], metadata: TorchDistMetadata) -> ItemFile:
    """Give each piece its place in file `number`, and enter it in `metadata`."""
    file = ItemFile(file_name(number), [])
    start = 0
    for piece in pieces:
        stored = metadata.tensors[piece.key]
        offsets, sizes = piece.box(stored.shape)
        item = TensorItem(sizes, stored.dtype, start)
        stored.chunks.append(Chunk(offsets, sizes, Place(file.name, start, item.length)))
        file.items.append((piece, item))
        start = item.end + -item.end % ALIGNMENT
    return file


class ItemWriter:
    """Writes item files with several threads, in bounded memory."""

    def __init__(self, tensors: dict[str, HfTensor], metadata: TorchDistMetadata) -> None:
        self._tensors = tensors
        self._metadata = metadata

    def write(
        self,
        files: list[ItemFile],
        journal: Journal,
        workers: int,
        memory: MemoryLimit,
        counter: ProgressCounter,
    ) -> None:
        """Write those of `files` that the journal does not know as finished."""
        waiting = [file for file in files if file.name not in journal.finished]
        counter.start(sum(file.nbytes for file in files if file.name in journal.finished))
        computed = max((self._row_cost(part, piece) for part, piece in _computed(waiting)), default=0)
        if computed:
            import torch  # noqa: F401 -- now, so that what it takes is counted
        workers, size = memory.share(
            workers, max(computed, MAPPED_SIZE), MAX_PART_SIZE if computed else MAPPED_SIZE
        )

        def write_file(file: ItemFile) -> None:
            self._write_file(journal.folder / file.name, file, sources, size, counter)
            journal.finish(file.name)

        with OpenFiles() as sources:
            for_each(write_file, waiting, workers)

    def _write_file(
        self,
        path: Path,
        file: ItemFile,
        sources: OpenFiles,
        size: int,
        counter: ProgressCounter,
    ) -> None:
        target = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            reserve(target, file.items[-1][1].end)
            for piece, item in file.items:
                crc, position = 0, item.payload_start
                for part in piece.parts:
                    if isinstance(part, ByteRange):
                        source = sources.mapped(part.file)
                        crc = copy_range(source, part.offset, part.nbytes, target, position, crc)
                        position += part.nbytes
                    else:
                        for data in self._computed_bytes(part, piece, sources, size):
                            crc = crc32(data, crc)
                            write_from(target, data, position)
                            position += len(data)
                write_from(target, item.head(crc), item.start)
                write_from(target, item.tail(crc), position)
                counter.add(piece.nbytes)
        finally:
            os.close(target)

    def _computed_bytes(
        self, part: HfRows, piece: Piece, sources: OpenFiles, size: int
    ) -> Iterator[memoryview]:
        from bridge.hf_rows import computed_bytes  # torch, only where bytes are not enough

        dtype = self._metadata.tensors[piece.key].dtype
        num_rows = max(1, size // self._row_cost(part, piece))
        return computed_bytes(self._tensors[part.name], part, dtype, sources, num_rows)

    def _row_cost(self, part: HfRows, piece: Piece) -> int:
        return part.working_size(self._tensors[part.name], self._metadata.tensors[piece.key].dtype)


def _computed(files: list[ItemFile]) -> Iterator[tuple[HfRows, Piece]]:
    for file in files:
        for piece, _ in file.items:
            yield from ((part, piece) for part in piece.parts if isinstance(part, HfRows))
