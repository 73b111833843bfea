"""Tensors in files, mapped into memory: only the pages of what is copied out are ever read."""

import math
from pathlib import Path

import torch

from bridge.byte_copy import OpenFiles
from bridge.dtypes import ITEM_SIZES
from bridge.torch_dist.items import Payload, locate_payload


class MappedFiles:
    """Files mapped for reading, each once, as long as this object or a view of it lives."""

    def __init__(self) -> None:
        self._files: dict[Path, torch.Tensor] = {}

    def elements(self, file: Path, offset: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return the bytes of a contiguous tensor: `shape` and a last axis for the bytes of an element.

        The caller has checked that the file is long enough. Bytes rather than elements, because a payload
        may begin at any byte while torch wants elements aligned.
        """
        if file not in self._files:
            size = file.stat().st_size
            self._files[file] = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        size = ITEM_SIZES[dtype]
        return self._files[file][offset : offset + math.prod(shape) * size].view(*shape, size)


class StoredItems:
    """Tensors of `.distcp` files, each located and checked once."""

    def __init__(self, files: OpenFiles, mapped: MappedFiles) -> None:
        self._files = files
        self._mapped = mapped
        self._payloads: dict[tuple[Path, int], Payload] = {}

    def elements(
        self, file: Path, start: int, length: int, shape: tuple[int, ...], key: str
    ) -> tuple[torch.Tensor, str]:
        """Return the bytes of the item in [start, start + length) as `MappedFiles.elements`, and its dtype.

        CheckpointError names the file and the key of what is damaged or no plain tensor of this shape.
        """
        if (file, start) not in self._payloads:
            with self._files.opened(file) as descriptor:
                found = locate_payload(descriptor, start, length, shape, f"{file}, {key!r}")
            self._payloads[file, start] = found
        payload = self._payloads[file, start]
        return self._mapped.elements(file, payload.offset, shape, payload.dtype), payload.dtype


def copy_elements(target: torch.Tensor, stored: torch.Tensor, dtype: str) -> None:
    """Copy bytes of a mapped file into a tensor of the same shape, cast where its dtype is another."""
    if is_aligned(stored):
        target.copy_(stored.view(getattr(torch, dtype)).squeeze(-1))
    elif target.dtype is getattr(torch, dtype):
        target.unsqueeze(-1).view(torch.uint8).copy_(stored)
    else:
        aligned = stored.clone(memory_format=torch.contiguous_format)
        target.copy_(aligned.view(getattr(torch, dtype)).squeeze(-1))


def is_aligned(stored: torch.Tensor) -> bool:
    """Say whether every element begins at a multiple of its size; a mapped file begins at a page."""
    size = stored.shape[-1]
    return not any(number % size for number in (stored.storage_offset(), *stored.stride()[:-1]))
