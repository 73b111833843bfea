"""Megatron checkpoints of live models: save and load through `dist_checkpointing`, in any parallel layout."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from bridge import restricted_load
from bridge.byte_copy import OpenFiles
from bridge.errors import InputError
from bridge.families import provider_of
from bridge.hf_checkpoint import HfCheckpoint
from bridge.live_weights import fill, load_hf_weights
from bridge.megatron_checkpoint import is_training_state, resolve_checkpoint, write_model
from bridge.pretrained import is_hf_folder
from bridge.provider import GPTModelProvider
from bridge.staging import SUFFIX, staged_folder
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


@contextmanager
def open_weights(folder: Path) -> Iterator[MegatronSource]:
    """Open the model's tensors of a Megatron checkpoint; no code that may lie in its files is run."""
    with OpenFiles() as files:
        yield MegatronSource(folder, read_metadata(folder, skip=is_training_state), files)


def save_checkpoint(
    chunks: Sequence[torch.nn.Module],
    provider: GPTModelProvider,
    folder: Path,
    hf_files: Iterable[Path] = (),
) -> None:
    """Save the model's weights as a checkpoint of its own; it appears when it is complete."""
    if folder.exists():
        raise InputError(f"{folder} exists already: give another folder or remove it")
    first = torch.distributed.get_rank() == 0
    nbytes = 4 * sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    partial = folder.with_name(folder.name + SUFFIX)
    torch.distributed.barrier()  # no rank may see the folder that another one makes
    with staged_folder(folder, nbytes) if first else nullcontext(partial):
        torch.distributed.barrier()
        dist_checkpointing.save(model_state(chunks), str(partial))
        torch.distributed.barrier()
        if first:
            write_model(partial, provider, hf_files)
    torch.distributed.barrier()
