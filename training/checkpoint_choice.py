"""The checkpoint that a run goes on from: the last one that is whole, and of the same data and model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bridge.agreement import answer_of_first_rank, first_of_all
from bridge.errors import CheckpointError
from bridge.megatron_checkpoint import LATEST, resolve_checkpoint
from training.checkpoint_folders import (
    complete_checkpoints,
    iteration_of,
    remove_leftovers,
    set_aside,
    write_latest,
)
from training.checkpoint_record import check_files, check_tensors
from training.config import CheckpointConfig, ConfigContainer
from training.resume_checks import check_resume


def last_checkpoint(config: ConfigContainer) -> Path | None:
    """Return the newest checkpoint, on every rank, after removing what is none; all ranks call it together.

    A damaged one is a CheckpointError, or set aside if the config says so.
    """
    root = Path(str(config.checkpoint.save))
    for folder in reversed(answer_of_first_rank(partial(candidates, root))):
        if is_whole(folder, config.checkpoint):
            answer_of_first_rank(partial(accept, config, folder))
            return folder
    return None


def branching_point(config: ConfigContainer) -> Path:
    """Return the checkpoint of another run that this one goes on from; nothing in its folder is changed.

    One that is damaged, or no checkpoint of a run, is a CheckpointError; other data or another model a
    ConfigError.
    """
    folder = resolve_checkpoint(Path(str(config.checkpoint.load)))
    if damage := damage_of(folder, config.checkpoint.verify_tensors):
        raise CheckpointError(f"{damage}: restore it, or give another checkpoint.load")
    answer_of_first_rank(partial(check_resume, config, folder))
    return folder


def candidates(root: Path) -> list[Path]:
    """Remove what a killed run left half done; return the complete checkpoints in order."""
    remove_leftovers(root)
    found = complete_checkpoints(root)
    if not found:  # all of them may have been set aside
        (root / LATEST).unlink(missing_ok=True)
    return found


def accept(config: ConfigContainer, folder: Path) -> None:
    check_resume(config, folder)
    write_latest(folder.parent, iteration_of(folder))


def is_whole(folder: Path, settings: CheckpointConfig) -> bool:
    """Say whether a checkpoint is what was written; unless the config allows another one, it has to be."""
    damage = damage_of(folder, settings.verify_tensors)
    if damage is None:
        return True
    if not settings.fall_back_if_damaged:
        raise CheckpointError(
            f"{damage}: restore it, or set checkpoint.fall_back_if_damaged to go on from the one before it"
        )
    answer_of_first_rank(partial(give_up, folder, damage))
    return False


def damage_of(folder: Path, verify_tensors: bool) -> str | None:
    """Say what is wrong with a checkpoint: its small files are for the first rank, tensors for all ranks."""
    damage = answer_of_first_rank(partial(message_of, partial(check_files, folder)))
    if damage is None and verify_tensors:
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        damage = first_of_all(message_of(partial(check_tensors, folder, rank, ranks)))
    return damage


def message_of(check: Callable[[], None]) -> str | None:
    try:
        check()
    except CheckpointError as error:
        return str(error)
    return None


def give_up(folder: Path, damage: str) -> None:
    """Take the checkpoint's name from it; the latest is what remains, if anything."""
    print(f"{damage}: it is now {set_aside(folder)}", flush=True)
    candidates(folder.parent)
