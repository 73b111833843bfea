"""The text of a run: Megatron's GPT datasets, in an order that the data-parallel size does not change."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import ConcatDataset, DataLoader

from bridge.errors import ConfigError
from training.blend import Part, check_files, find_datasets, find_parts
from training.config import DatasetConfig
from training.sample_order import Blend, EpochDataset

Batch = dict[str, torch.Tensor]
SAMPLE_INDICES = "sample_indices"


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


def build_datasets(
    config: DatasetConfig, sizes: dict[str, int | None], seq_length: int, vocab_size: int
) -> dict[str, Any]:
    """Build the splits named in `sizes`, with at least so many samples each; None is one pass over it.

    All ranks call this together. Every rank reads its own samples from the memory-mapped files, which is
    cheaper than sending them around.
    """
    check_files(config, list(sizes), seq_length, vocab_size)
    if config.path_to_cache is None:
        # beside the dataset, as Megatron has it, may be a sealed place
        raise ConfigError("neither dataset.path_to_cache nor checkpoint.save says where sample indices go")
    record = next(iter(find_datasets(config).values())).record
    megatron = megatron_config(config, DatasetTokenizer(record["eod"], record["vocab_size"]), seq_length)

    def build() -> dict[str, Any]:
        parts = find_parts(config, list(sizes))
        return {split: build_split(parts[split], size, split, megatron) for split, size in sizes.items()}

    return first_rank_first(build)


def build_split(parts: list[Part], size: int | None, split: str, config: GPTDatasetConfig) -> Any:
    """Build at least `size` samples of one split; None is every sample of each of its datasets once."""
    if len(parts) == 1:
        return EpochDataset(parts[0], size, split, config)
    if size is not None:
        return Blend(parts, size, split, config)
    long_enough = [part for part in parts if part.tokens > config.sequence_length]
    return ConcatDataset([EpochDataset(part, None, split, config) for part in long_enough])


def first_rank_first(build: Callable[[], Any]) -> Any:
    """Let the first rank write the files that the other ranks then find, if they see them."""
    if not torch.distributed.is_initialized():
        return build()
    built = build() if torch.distributed.get_rank() == 0 else None
    torch.distributed.barrier()
    return build() if built is None else built


def megatron_config(config: DatasetConfig, tokenizer: DatasetTokenizer, seq_length: int) -> GPTDatasetConfig:
    """Return Megatron's config of a GPT dataset; which files it reads is said elsewhere."""
    return GPTDatasetConfig(
        random_seed=config.random_seed,
        sequence_length=seq_length,
        split="1,1,1",  # asked for, but read by the mock datasets only
        tokenizer=tokenizer,
        path_to_cache=config.path_to_cache,
        # rotary embeddings read no position ids and the fused attention no mask, so they could change nothing
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,
    )


def build_mock_datasets(
    config: DatasetConfig, sizes: dict[str, int | None], seq_length: int, vocab_size: int
) -> dict[str, Any]:
    """Build the splits named in `sizes` of Megatron's made-up sequences, which count upwards."""
    megatron = megatron_config(config, DatasetTokenizer(vocab_size - 1, vocab_size), seq_length)
    counts = [sizes.get(split.name, 0) for split in Split]
    built = BlendedMegatronDatasetBuilder(MockGPTDataset, counts, lambda: True, megatron).build()
    return {split.name: built[split.value] for split in Split if split.name in sizes}


def batches(
    dataset: Any, *, consumed_samples: int, micro_batch_size: int, num_workers: int = 0
) -> Iterator[Batch]:
    """Return an iterator over this rank's micro-batches, from sample `consumed_samples` of the run on.

    Asking for more than `dataset` has is a ConfigError.
    """
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
        worker_init_fn=leave_ending_to_rank,
        pin_memory=torch.cuda.is_available(),
        # its own generator: the default one belongs to the model, and a resumed run puts it back
        generator=torch.Generator(),
    )
    return or_error(iter(loader), len(dataset))


def or_error(batches: Iterator[Batch], num_samples: int) -> Iterator[Batch]:
    """Yield `batches`; asking for more is an error that says why there are none."""
    yield from batches
    raise ConfigError(
        f"the data are used up: there are {num_samples} samples, which is too few for this run; ask for fewer"
        " iterations, or for text in dataset.blend, which is read as often as it takes"
    )


def leave_ending_to_rank(worker: int) -> None:
    """Let this worker process end by the word of its rank only, whoever else sends SIGTERM.

    torchrun and schedulers tell every process of a job to stop, and a rank reads on until it has saved. To
    ignore the signal is not enough: a rank that exits ends its workers by SIGTERM and waits for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=end_with_rank, args=(os.getppid(),), daemon=True).start()


def end_with_rank(process_id: int) -> None:
    """End this process when that one sends it SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process_id:
        pass
    os._exit(0)


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
