"""Megatron checkpoints of live models: save and load through `dist_checkpointing`, in any parallel layout."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from bridge import restricted_load
from bridge.errors import InputError
from bridge.megatron_checkpoint import write_model
from bridge.provider import GPTModelProvider
from bridge.staging import SUFFIX, staged_folder


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
    """Fill the chunks from the checkpoint in `folder`, whatever layout wrote it."""
    load_model_state(chunks, restricted_load.load(model_state(chunks), folder))


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
