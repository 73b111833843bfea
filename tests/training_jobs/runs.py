"""A job of the tests: several training runs and evaluations, one after the other, in one process group."""

import shutil
from pathlib import Path
from typing import Any

import torch

from bridge import distributed
from training import evaluate, gpt_step
from training.config import ConfigContainer
from training.pretrain import pretrain


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Train each of `runs`; one with "from" starts from a copy of that folder. Then evaluate each."""
    reports = {name: train(**run) for name, run in config["runs"].items()}
    losses = {
        name: evaluate.main({**job, "report": config["report"]}) for name, job in config["evaluate"].items()
    }
    return {"runs": reports, "evaluate": losses}


def train(config: dict[str, Any], resume_from: str | None = None) -> dict[str, Any]:
    container = ConfigContainer.from_dict(config)
    if resume_from and distributed_rank() == 0:
        folder = Path(container.checkpoint.save or "") / Path(resume_from).name
        shutil.copytree(resume_from, folder)
    report = pretrain(container, gpt_step.forward_step)
    torch.distributed.barrier()
    distributed.finalize()
    return report


def distributed_rank() -> int:
    import os

    return int(os.environ["RANK"])
