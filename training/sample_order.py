"""The order of a run's samples: the same at its beginning however long it is, and kept in files once.

Megatron shuffles all epochs of a run as one, so that a run with more iterations sees other batches from the
first one on. Here epoch number e has an order of its own, and is always built whole: a longer run goes on
where a shorter one ends. Within the first epoch it is Megatron's own order.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from bridge.folder_lock import locked
from training.blend import Part

PARTIAL = ".partial"
Arrays = dict[str, NDArray]


class EpochDataset(GPTDataset):
    """At least `num_samples` samples of a part, in whole epochs; None is one epoch."""

    def __init__(self, part: Part, num_samples: int | None, split: str, config: GPTDatasetConfig) -> None:
        self.part = part
        documents = numpy.arange(part.begin, part.end, dtype=numpy.int32)
        indexed = IndexedDataset(str(part.prefix))
        super().__init__(indexed, str(part.prefix), documents, num_samples, Split[split], config)

    def _build_document_sample_shuffle_indices(self) -> tuple[NDArray, NDArray, NDArray]:
        epochs = self.num_epochs()
        part, config = self.part, self.config
        content = [
            part.index_digest,
            part.begin,
            part.end,
            config.sequence_length,
            config.random_seed,
            epochs,
        ]
        arrays = kept(Path(str(config.path_to_cache)), "samples", content, lambda: self._build(epochs))
        return arrays["documents"], arrays["samples"], arrays["order"]

    def num_epochs(self) -> int:
        """Return how many epochs hold the samples that are wanted."""
        wanted = 1 if self.num_samples is None else self.num_samples
        return max(1, -(-(wanted * self.config.sequence_length + 1) // self.part.tokens))

    def _build(self, epochs: int) -> Arrays:
        """Shuffle each epoch's documents, cut their tokens into samples, shuffle each epoch's samples."""
        length, tokens = self.config.sequence_length, self.part.tokens
        # a sample has one token more than its length, which the next one begins with
        ends = [(epoch * tokens - 1) // length for epoch in range(epochs + 1)]
        ends[0] = 0
        documents, order = [], []
        for epoch in range(epochs):
            seed = self.config.random_seed
            random = numpy.random.RandomState(seed if epoch == 0 else [seed, epoch])
            documents.append(self.indices.copy())
            random.shuffle(documents[-1])
            order.append(numpy.arange(ends[epoch], ends[epoch + 1], dtype=numpy.int64))
            random.shuffle(order[-1])
        index = numpy.concatenate(documents)
        samples = helpers.build_sample_idx(
            numpy.array(self.dataset.sequence_lengths), index, length, epochs, tokens, True, True
        )
        assert len(samples) == ends[-1] + 1
        dtype = numpy.uint32 if ends[-1] < 2**32 - 1 else numpy.int64
        return {"documents": index, "samples": samples, "order": numpy.concatenate(order).astype(dtype)}


class Blend(torch.utils.data.Dataset):
    """`num_samples` samples drawn from several parts in proportion to their weights, evenly all along.

    Megatron's BlendedDataset does the same, but writes its files where a killed run leaves half of one, fails
    on a node that does not see them, and adds a tensor to the sample that context parallelism cannot divide.
    """

    def __init__(self, parts: list[Part], num_samples: int, split: str, config: GPTDatasetConfig) -> None:
        weights = numpy.array([part.weight for part in parts])
        weights /= weights.sum()

        def build() -> Arrays:
            which = numpy.zeros(num_samples, dtype=numpy.int16)
            sample = numpy.zeros(num_samples, dtype=numpy.int64)
            helpers.build_blending_indices(which, sample, weights, len(parts), num_samples, False)
            return {"which": which, "sample": sample, "counts": numpy.bincount(which, minlength=len(parts))}

        arrays = kept(Path(str(config.path_to_cache)), "blend", [weights.tolist(), num_samples], build)
        self.which, self.sample = arrays["which"], arrays["sample"]
        self.datasets = [
            EpochDataset(part, max(1, int(count)), split, config)
            for part, count in zip(parts, arrays["counts"], strict=True)
        ]

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.datasets[self.which[index]][self.sample[index]]


def kept(cache: Path, kind: str, content: list[Any], build: Callable[[], Arrays]) -> Arrays:
    """Return the arrays that `content` determines, memory-mapped from a folder of `cache`; build them once.

    The folder appears when it is complete. Runs, ranks and nodes may share `cache`: of those on one machine
    one builds and the others wait, of those on several machines the first that is ready wins.
    """
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    folder = cache / f"{kind}-{digest}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache):
            if not folder.is_dir():
                _write(folder, build())
    return {path.stem: numpy.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def _write(folder: Path, arrays: Arrays) -> None:
    ours = f"{folder.name}.{socket.gethostname()}"
    for left in folder.parent.glob(f"{ours}.*{PARTIAL}"):  # of a killed run: this machine's lock is ours
        shutil.rmtree(left)
    beside = folder.with_name(f"{ours}.{os.getpid()}{PARTIAL}")
    beside.mkdir()
    for name, array in arrays.items():
        numpy.save(beside / f"{name}.npy", array)
    try:
        beside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(beside)  # another machine was first, with the same
