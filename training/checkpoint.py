"""Where a run begins: its last complete checkpoint, exact in the same layout, or from any other layout."""

from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from bridge import live_checkpoint, restricted_load
from bridge.megatron_checkpoint import resolve_checkpoint
from bridge.pipeline_split import COUNTED, UNEVEN
from bridge.pretrained import resolve_pretrained
from training import fp8_state
from training.checkpoint_choice import branching_point, last_checkpoint
from training.config import ConfigContainer
from training.optimizer_groups import fit_groups
from training.optimizer_state import SHARDING, local_state
from training.random_state import set_random_state, sharded_random_state
from training.resume_checks import read_run_config
from training.setup import Run

DELAYED = "delayed"
SPLIT_FIELDS = ("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout", *UNEVEN, *COUNTED)
# every optimizer tensor has the shape of its parameter, so that any layout can load it
METADATA = {"distrib_optim_sharding_type": SHARDING, "chained_optim_avoid_prefix": True}


def start_or_resume(run: Run) -> None:
    """Load the run's last complete checkpoint, else another run's that it branches off from, else weights."""
    pretrained = run.config.checkpoint.pretrained_checkpoint
    last = last_checkpoint(run.config) if run.config.checkpoint.save else None
    if last is not None:
        load(run, last)
    elif run.config.checkpoint.load is not None:
        load(run, branching_point(run.config))
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
    folder, weights = resolve_checkpoint(source), live_checkpoint.model_state(run.model)
    live_checkpoint.check_vocabulary(run.model, folder)
    state = restricted_load.load(weights, folder, common=False)
    live_checkpoint.load_model_state(run.model, state)
    run.optimizer.reload_model_params(state_dict=state)


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
    run.optimizer.load_state_dict(fit_groups(state["optimizer"], run.optimizer))
    run.scheduler.load_state_dict(scheduler_state(state["opt_param_scheduler"], run.config, folder))
    run.faults.load_state_dict(state["faults"])
    if "rng_state" in state:
        set_random_state(state["rng_state"])
    if fp8_state.KEY in state:
        fp8_state.load_fp8_state(run.model, state[fp8_state.KEY])
    run.iteration, run.consumed_samples = state["iteration"], state["consumed_samples"]
    run.source = folder


def scheduler_state(saved: dict[str, Any], config: ConfigContainer, folder: Path) -> dict[str, Any]:
    """Return the schedule's state after as many iterations as before, were all of them of this batch size.

    Megatron's schedule counts samples; its lengths are iterations, each of `train.global_batch_size` samples.
    """
    before = read_run_config(folder)["train"]["global_batch_size"]
    return {**saved, "num_steps": saved["num_steps"] * config.train.global_batch_size // before}


def state_of(run: Run, *, is_loading: bool) -> dict[str, Any]:
    """Return all that a run goes on from, as Megatron's sharded state dict."""
    weights = live_checkpoint.model_state(run.model)
    precision = run.config.mixed_precision
    delayed = precision.fp8 is not None and precision.fp8_recipe == DELAYED
    return {
        **weights,
        **({fp8_state.KEY: fp8_state.sharded_fp8_state(run.model), "split": split(run)} if delayed else {}),
        "optimizer": (
            run.optimizer.sharded_state_dict(weights, is_loading=True, metadata=METADATA)
            if is_loading
            else local_state(run.optimizer, weights)
        ),
        "opt_param_scheduler": run.scheduler.state_dict(),
        "faults": run.faults.state_dict(),
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
