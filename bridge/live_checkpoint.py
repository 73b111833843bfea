"""Megatron checkpoints of live models: save and load through `dist_checkpointing`, in any parallel layout."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from bridge import restricted_load
from bridge.agreement import on_every_rank, on_first_rank
from bridge.byte_copy import OpenFiles
from bridge.errors import BridgeworksError
from bridge.families import provider_of
from bridge.hf_checkpoint import HfCheckpoint
from bridge.live_vocabulary import check_own_vocabulary, noted_vocab_size, padded_vocab_size
from bridge.live_weights import fill, load_hf_weights
from bridge.megatron_checkpoint import (
    is_training_state,
    read_vocabulary,
    resolve_checkpoint,
    write_model,
)
from bridge.pretrained import is_hf_folder
from bridge.provider import GPTModelProvider
from bridge.shared_folder import shared_folder
from bridge.torch_dist.metadata import read_metadata
from bridge.weight_sources import MegatronSource


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return the sharded state dict of this rank's chunks, without `_extra_state`."""
    state = {
        f"model{number}": chunk.sharded_state_dict()
        for number, chunk in enumerate(unwrap_model(list(chunks)))
    }
    return restricted_load.without_extra_state(state)


def load_model_state(chunks: Sequence[torch.nn.Module], state: dict[str, Any]) -> None:
    """Put a loaded `model_state` into the chunks."""
    for number, chunk in enumerate(unwrap_model(list(chunks))):
        restricted_load.load_weights(chunk, state[f"model{number}"])


def load_checkpoint(chunks: Sequence[torch.nn.Module], folder: Path) -> None:
    """Fill this rank's model chunks from `folder`; all ranks call it together.

    The folder is a Megatron checkpoint of any parallel layout, a training run's or a Hugging Face one. Each
    rank reads its own slices, in place and cast to the model's dtype. A tensor that is missing, left over, of
    another shape or damaged is an InputError on every rank.
    """
    if is_hf_folder(folder):
        checkpoint = HfCheckpoint.open(folder)
        load_hf_weights(chunks, provider_of(checkpoint.config), checkpoint)
    else:
        with open_weights(resolve_checkpoint(folder)) as source:
            fill(chunks, source)


def write_files(chunks: Sequence[torch.nn.Module], folder: Path) -> None:
    """Write Megatron's files; a failure of one rank's is an error of all, and the first one knows which."""
    try:
        dist_checkpointing.save(model_state(chunks), str(folder))
    except CheckpointException as error:
        raise BridgeworksError(f"{folder} could not be written: {restricted_load.reason(error)}") from error


def check_vocabulary(chunks: Sequence[torch.nn.Module], folder: Path) -> None:
    """Raise CoverageError unless a resolved checkpoint is for the vocabulary of a model.

    Megatron itself loads an embedding of any other number of rows, as far as it goes.
    """
    with open_weights(folder) as source:
        source.check_vocabulary(padded_vocab_size(chunks), noted_vocab_size(chunks))


@contextmanager
def open_weights(folder: Path) -> Iterator[MegatronSource]:
    """Open the model's tensors of a Megatron checkpoint; no code that may lie in its files is run."""
    with OpenFiles() as files:
        metadata = read_metadata(folder, skip=is_training_state)
        yield MegatronSource(folder, metadata, read_vocabulary(folder), files)


def save_checkpoint(
    chunks: Sequence[torch.nn.Module],
    provider: GPTModelProvider,
    folder: Path,
    hf_files: Iterable[Path] = (),
) -> None:
    """Save the model's weights as a checkpoint of its own; it appears when it is complete."""
    nbytes = 4 * sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    padding = check_own_vocabulary(chunks, provider)
    with shared_folder(folder, nbytes) as partial:
        on_every_rank(lambda: write_files(chunks, partial))
        on_first_rank(lambda: write_model(partial, provider, hf_files, num_padding_rows=padding))
