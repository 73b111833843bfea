"""Checkpoints of a run: complete folders only, exact resume, from any layout into any other."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state

from bridge import live_checkpoint, restricted_load
from bridge.hf_checkpoint import side_files
from bridge.megatron_checkpoint import LATEST, resolve_checkpoint, write_model
from bridge.pipeline_split import COUNTED, UNEVEN
from bridge.pretrained import copy_model, resolve_pretrained
from bridge.staging import SUFFIX, staged_folder
from training import fp8_state
from training.random_state import set_random_state, sharded_random_state
from training.setup import Run, whole_parameters

RUN_CONFIG = "run_config.json"
REMOVED = ".removed"
DELAYED = "delayed"
SPLIT_FIELDS = ("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout", *UNEVEN, *COUNTED)
BYTES_PER_PARAMETER = 16  # the weight, its fp32 master and two fp32 moments, at most
# every optimizer tensor has the shape of its parameter, so that any layout can load it
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def start_or_resume(run: Run) -> None:
    """Load the run's last complete checkpoint, else the weights that it starts from, else nothing."""
    root = run.config.checkpoint.save
    pretrained = run.config.checkpoint.pretrained_checkpoint
    last = last_checkpoint(Path(root)) if root else None
    if last is not None:
        load(run, last)
    elif pretrained is not None:
        run.source = resolve_pretrained(Path(pretrained))
        load_first_weights(run, run.source)


def load_first_weights(run: Run, source: Path) -> None:
    """Fill the model, and the optimizer's master weights, from a checkpoint that is not the run's own."""
    if not run.config.mixed_precision.fp8_param:
        live_checkpoint.load_checkpoint(run.model, source)
        run.optimizer.reload_model_params()
        return
    # FP8 weights cannot be filled in place, and the master weights must not go through FP8
    state = restricted_load.load(live_checkpoint.model_state(run.model), resolve_checkpoint(source))
    live_checkpoint.load_model_state(run.model, state)
    run.optimizer.reload_model_params(state_dict=state)


def last_checkpoint(root: Path) -> Path | None:
    """Return the first rank's choice on every rank, after what a killed run left has been removed."""
    choice: list[Path | None] = [None]
    if torch.distributed.get_rank() == 0:
        remove_leftovers(root)
        choice = [*complete_checkpoints(root)[-1:], None][:1]
    torch.distributed.broadcast_object_list(choice, src=0)
    return choice[0]


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the iteration folders in order; they get these names only when everything is in them."""
    found = root.iterdir() if root.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"iter_\d{7,}", path.name)), key=iteration_of)


def iteration_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def remove_leftovers(root: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in root.glob("iter_*"):
        if path.name.endswith((SUFFIX, REMOVED)):
            shutil.rmtree(path)


def save(run: Run) -> Path:
    """Save the run; the folder gets its name when it is complete, and then becomes the latest."""
    root = Path(str(run.config.checkpoint.save))
    folder = root / f"iter_{run.iteration:07d}"
    partial = folder.with_name(folder.name + SUFFIX)
    torch.distributed.barrier()  # no rank may see the folder that another one makes
    with staged_folder(folder, size_of(run)) if run.is_first_rank else nullcontext(partial):
        torch.distributed.barrier()
        with whole_parameters(run):
            dist_checkpointing.save(state_of(run, is_loading=False), str(partial))
        torch.distributed.barrier()
        if run.is_first_rank:
            describe(run, partial)
    if run.is_first_rank:
        write_latest(root, run.iteration)
        remove_old(root, run.config.checkpoint.most_recent_k)
    torch.distributed.barrier()
    return folder


def load(run: Run, folder: Path) -> None:
    """Go on from `folder`: bit for bit in the layout that wrote it, within rounding in any other."""
    requested = state_of(run, is_loading=True)
    saved = restricted_load.load_common(folder)
    if saved["layout"] != layout():
        del requested["rng_state"]  # one for each rank, and there are other ranks now
    if fp8_state.KEY in requested and (saved["layout"] != layout() or saved.get("split") != split(run)):
        del requested[fp8_state.KEY]  # the modules' scaling starts anew, and is right after one micro-batch
    state = restricted_load.load(requested, folder)
    live_checkpoint.load_model_state(run.model, state)
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["opt_param_scheduler"])
    if "rng_state" in state:
        set_random_state(state["rng_state"])
    if fp8_state.KEY in state:
        fp8_state.load_fp8_state(run.model, state[fp8_state.KEY])
    run.iteration, run.consumed_samples = state["iteration"], state["consumed_samples"]
    run.source = folder


def state_of(run: Run, *, is_loading: bool) -> dict[str, Any]:
    """Return all that a run goes on from, as Megatron's sharded state dict."""
    weights = live_checkpoint.model_state(run.model)
    precision = run.config.mixed_precision
    delayed = precision.fp8 is not None and precision.fp8_recipe == DELAYED
    return {
        **weights,
        **({fp8_state.KEY: fp8_state.sharded_fp8_state(run.model), "split": split(run)} if delayed else {}),
        "optimizer": run.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=METADATA),
        "opt_param_scheduler": run.scheduler.state_dict(),
        "rng_state": sharded_random_state(),
        "iteration": run.iteration,
        "consumed_samples": run.consumed_samples,
        "layout": layout(),
    }


def layout() -> dict[str, int]:
    """Return the sizes that decide which random numbers a rank draws."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def split(run: Run) -> list[Any]:
    """Return what decides which layers a pipeline stage has."""
    return [getattr(run.config.model, name) for name in SPLIT_FIELDS]


def describe(run: Run, folder: Path) -> None:
    """Add what export and people need: the model's description, its side files, the resolved config."""
    if run.source is not None:
        copy_model(run.source, folder)
    else:
        tokenizer = run.config.tokenizer.tokenizer_model
        write_model(folder, run.config.model, side_files(Path(tokenizer)) if tokenizer else ())
    (folder / RUN_CONFIG).write_text(json.dumps(run.config.to_dict(), indent=1) + "\n")


def size_of(run: Run) -> int:
    """Return about how many bytes a checkpoint takes."""
    local = sum(parameter.numel() for chunk in run.model for parameter in chunk.parameters())
    return local * run.config.model.model_parallel_size * BYTES_PER_PARAMETER


def write_latest(root: Path, iteration: int) -> None:
    beside = root / f"{LATEST}{SUFFIX}"
    beside.write_text(f"{iteration}\n")
    beside.replace(root / LATEST)


def remove_old(root: Path, most_recent_k: int | None) -> None:
    """Keep the newest checkpoints; the others lose their names before their files."""
    if most_recent_k is not None:
        for folder in complete_checkpoints(root)[:-most_recent_k]:
            shutil.rmtree(folder.rename(folder.with_name(folder.name + REMOVED)))
