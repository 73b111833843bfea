"""A job of the tests: iterations with losses and gradients that are no numbers, one run after the other."""

import hashlib
import itertools
from typing import Any

import torch
from training_jobs.spoiled import spoiled_step

from bridge.distributed import leave_model_parallel
from bridge.errors import DivergenceError
from training import checkpoint
from training.config import ConfigContainer
from training.pretrain import prepare, pretrain, train_step
from training.setup import Run, build_data, iterators, set_up, whole_parameters


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Return what became of each run of `steps`, looked at from inside, and of `runs`, as users see it."""
    return {
        "steps": {name: in_turn(look_inside, job) for name, job in config["steps"].items()},
        "runs": {name: in_turn(run, job) for name, job in config["runs"].items()},
    }


def in_turn(function: Any, job: dict[str, Any]) -> dict[str, Any]:
    try:
        result = function(ConfigContainer.from_dict(job["config"]), spoiled_step(*job["spoil"]))
    except DivergenceError as error:  # of all ranks
        result = {"error": str(error)}
    leave_model_parallel()
    return result


def run(config: ConfigContainer, forward_step: Any) -> dict[str, Any]:
    return pretrain(config, forward_step)


def look_inside(config: ConfigContainer, forward_step: Any) -> dict[str, Any]:
    """Take four steps, of which the third is spoiled; return on which the state of any rank changed."""
    prepare(config)
    run = set_up(config, forward_step)
    checkpoint.start_or_resume(run)
    data = iterators(run, build_data(run)["train"], run.consumed_samples)
    digests, steps, rates = [digest(run)], [], []
    for _ in range(4):
        steps.append(train_step(run, data))
        digests.append(digest(run))
        rates.append(run.scheduler.num_steps)
    changed: list[Any] = [None] * torch.distributed.get_world_size()
    mine = [a != b for a, b in itertools.pairwise(digests)]
    torch.distributed.all_gather_object(changed, mine)
    return {
        "changed": changed,
        "skipped": [step.is_skipped for step in steps],
        "rates": rates,
        "iteration": run.iteration,
        "consumed_samples": run.consumed_samples,
    }


def digest(run: Run) -> str:
    """Return a digest of every bit of this rank's weights and optimizer."""
    found = hashlib.sha256()
    with whole_parameters(run), torch.no_grad():
        tensors = [parameter for chunk in run.model for parameter in chunk.parameters()]
        for optimizer in run.optimizer.chained_optimizers:
            for group in optimizer.optimizer.param_groups:
                tensors += [*group["params"], torch.tensor(group.get("step", 0))]
                for parameter in group["params"]:
                    tensors += optimizer.optimizer.state[parameter].values()
        for tensor in tensors:
            found.update(tensor.detach().float().numpy().tobytes())
    return found.hexdigest()
