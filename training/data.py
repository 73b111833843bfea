"""The text of a run: Megatron's GPT datasets, in an order that the data-parallel size does not change."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader

from bridge.errors import CheckpointError, ConfigError
from training.config import DatasetConfig

Batch = dict[str, torch.Tensor]
Records = dict[str, dict[str, Any]]
RECORD = "dataset.json"
SAMPLE_INDICES = "sample_indices"
BUILDING = ".building"


@dataclass(frozen=True)
class DatasetTokenizer:
    """What Megatron's dataset asks of a tokenizer, taken from the record of the dataset itself."""

    eod: int
    vocab_size: int
    pad: int = -1  # no token: nothing is padded

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """Megatron names its cached indices after these."""
        return {"eod": self.eod, "vocab_size": self.vocab_size}


def read_record(folder: Path) -> dict[str, Any]:
    """Read what `training.build_dataset` says about a dataset folder."""
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a complete dataset folder: {error}") from error


def build_datasets(
    config: DatasetConfig, sizes: dict[str, int | None], seq_length: int, vocab_size: int
) -> dict[str, Any]:
    """Build the splits named in `sizes`, with at least so many samples each; None is one pass over it.

    All ranks call this together. Every rank reads its own samples from the memory-mapped files, which is
    cheaper than sending them around.
    """
    records = {path: read_record(Path(path)) for path in config.paths}
    if not records:
        raise ConfigError("dataset.paths is empty: name a folder that training.build_dataset made")
    if config.path_to_cache is None:
        # Megatron's own default is the dataset's folder, which may be sealed
        raise ConfigError("neither dataset.path_to_cache nor checkpoint.save says where sample indices go")
    cache = Path(config.path_to_cache)
    check_samples(records, sizes, seq_length)
    megatron = GPTDatasetConfig(
        random_seed=config.random_seed,
        sequence_length=seq_length,
        blend_per_split=[blend(config, records, s.name) if s.name in sizes else None for s in Split],
        tokenizer=tokenizer(records, vocab_size),
        path_to_cache=config.path_to_cache,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,
    )
    counts = [sizes.get(split.name, 0) for split in Split]
    start_building(cache)
    built = BlendedMegatronDatasetBuilder(GPTDataset, counts, lambda: True, megatron).build()
    end_building(cache)
    return {split.name: built[split.value] for split in Split if split.name in sizes}


def build_mock_datasets(
    config: DatasetConfig, sizes: dict[str, int | None], seq_length: int, vocab_size: int
) -> dict[str, Any]:
    """Build the splits named in `sizes` of Megatron's made-up sequences, which count upwards."""
    megatron = GPTDatasetConfig(
        random_seed=config.random_seed,
        sequence_length=seq_length,
        split="90,5,5",
        tokenizer=DatasetTokenizer(eod=vocab_size - 1, vocab_size=vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,
    )
    counts = [sizes.get(split.name, 0) for split in Split]
    built = BlendedMegatronDatasetBuilder(MockGPTDataset, counts, lambda: True, megatron).build()
    return {split.name: built[split.value] for split in Split if split.name in sizes}


def batches(
    dataset: Any, *, consumed_samples: int, micro_batch_size: int, num_workers: int = 0
) -> Iterator[Batch]:
    """Return an iterator over this rank's micro-batches, from sample `consumed_samples` of the run on."""
    sampler = MicroBatchSampler(
        total_samples=len(dataset),
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # its own generator: the default one belongs to the model, and a resumed run puts it back
        generator=torch.Generator(),
    )
    return iter(loader)


@dataclass(frozen=True)
class MicroBatchSampler:
    """Indices of one rank's micro-batches; ranks take turns, so a global batch is the same for any number."""

    total_samples: int
    consumed_samples: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def __iter__(self) -> Iterator[list[int]]:
        step = self.micro_batch_size * self.data_parallel_size
        first = self.consumed_samples + self.data_parallel_rank * self.micro_batch_size
        for start in range(first, self.total_samples - self.micro_batch_size + 1, step):
            yield list(range(start, start + self.micro_batch_size))


def blend(config: DatasetConfig, records: Records, split: str) -> tuple[list[str], list[float] | None]:
    """Return the files of one split and their weights, by default the numbers of their tokens."""
    prefixes = [str(Path(path) / split) for path in records]
    tokens = [float(record["splits"][split]["tokens"]) for record in records.values()]
    return prefixes, (config.weights or tokens) if len(prefixes) > 1 else None


def tokenizer(records: Records, vocab_size: int) -> DatasetTokenizer:
    """Return the tokenizer of the datasets, which must be one and fit the model."""
    (path, first), *others = records.items()
    for other, record in others:
        if record["tokenizer"] != first["tokenizer"]:
            raise ConfigError(f"the datasets {path} and {other} were made with different tokenizers")
    if first["vocab_size"] > vocab_size:
        raise ConfigError(
            f"the dataset {path} has a vocabulary of {first['vocab_size']} tokens, the model one of"
            f" {vocab_size}: build the dataset with the model's tokenizer"
        )
    return DatasetTokenizer(first["eod"], first["vocab_size"])


def check_samples(records: Records, sizes: dict[str, int | None], seq_length: int) -> None:
    """Refuse a split that is missing or too short for one sample."""
    for split in sizes:
        if missing := [path for path, record in records.items() if split not in record["splits"]]:
            raise ConfigError(f"the dataset {missing[0]} has no {split!r} split: build it with one")
        tokens = sum(record["splits"][split]["tokens"] for record in records.values())
        if tokens <= seq_length:
            raise ConfigError(
                f"the {split!r} split has {tokens} tokens, too few for one sample of {seq_length}:"
                " give more text, a larger fraction or a smaller seq_length"
            )


def start_building(cache: Path) -> None:
    """Remove the indices that a killed run may have left half written, and mark that building is under way.

    Megatron takes any index file that exists for a whole one (megatron/core/datasets/gpt_dataset.py).
    """
    if torch.distributed.get_rank() == 0:
        if (cache / BUILDING).exists():
            shutil.rmtree(cache)
        cache.mkdir(parents=True, exist_ok=True)
        (cache / BUILDING).touch()
    torch.distributed.barrier()


def end_building(cache: Path) -> None:
    """Take the mark away when every rank has its datasets."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (cache / BUILDING).unlink()
