"""A job of the tests: several training runs and evaluations, one after the other, in one process group."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.distributed import leave_model_parallel
from training import gpt_step
from training.config import ConfigContainer
from training.evaluate import evaluate
from training.pipeline import highest_of_all_ranks
from training.pretrain import pretrain


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Train each of `runs`; one with "from" starts from a copy of that folder. Then evaluate each."""
    reports = {name: train(**run) for name, run in config["runs"].items()}
    losses = {
        name: in_turn(evaluate, {**job, "report": config["report"]})
        for name, job in config["evaluate"].items()
    }
    highest = highest_of_all_ranks(int(os.environ["RANK"]) + 0.5)
    return {"runs": reports, "evaluate": losses, "highest": highest}


def train(config: dict[str, Any], resume_from: str | None = None) -> dict[str, Any]:
    container = ConfigContainer.from_dict(config)
    if resume_from and os.environ["RANK"] == "0":
        folder = Path(container.checkpoint.save or "") / Path(resume_from).name
        shutil.copytree(resume_from, folder)
    return in_turn(pretrain, container, gpt_step.forward_step)


def in_turn(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function that starts Megatron Core, and leave the process group to the next one."""
    result = function(*arguments)
    leave_model_parallel()
    return result
