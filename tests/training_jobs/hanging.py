"""A job of the tests: a run in which one rank really hangs: asleep, busy without end, or stopped."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import data, gpt_step
from training.config import ConfigContainer
from training.pretrain import pretrain

HANGING_RANK = "1"


def fall_asleep() -> None:
    time.sleep(3600)


def search_without_end() -> None:
    """Match in exponential time, in C code that keeps the interpreter from all threads."""
    re.match(r"(a+)+$", "a" * 60 + "b")


HANGS = {"asleep": fall_asleep, "busy": search_without_end}


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Train, and let one rank hang in iteration 3 in the way that "hang" says."""
    if os.environ["RANK"] == HANGING_RANK and config["hang"] in HANGS:
        hang_in_data(HANGS[config["hang"]], at=4)
    step = stopping_step(at=4) if config["hang"] == "stopped" else gpt_step.forward_step
    return pretrain(ConfigContainer.from_dict(config["config"]), step, report=Path(config["report"]))


def hang_in_data(hang: Callable[[], None], at: int) -> None:
    read = data.MicroBatchSampler.__iter__

    def read_and_hang(self: data.MicroBatchSampler) -> Any:
        for number, indices in enumerate(read(self)):
            if number == at:
                hang()
            yield indices

    data.MicroBatchSampler.__iter__ = read_and_hang


def stopping_step(at: int) -> Any:
    calls = [0]

    def step(data_iterator: Any, model: Any) -> Any:
        if os.environ["RANK"] == HANGING_RANK and calls[0] == at:
            os.kill(os.getpid(), signal.SIGSTOP)
        calls[0] += 1
        return gpt_step.forward_step(data_iterator, model)

    return step
