"""A job of the tests: `training.pretrain`, in which a rank is stopped or killed, once in each way."""

import os
import signal
from pathlib import Path
from typing import Any

from training import gpt_step, pretrain

DISTURBED_RANK = "1"


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Train; in the attempts to come each of "disturbances", (signal, micro-batch), befalls a rank once."""
    notes = Path(config["notes"])
    waiting = [(name, at) for name, at in config["disturbances"] if not (notes / name).exists()]
    if waiting and os.environ["RANK"] == DISTURBED_RANK:
        name, at = waiting[0]
        gpt_step.forward_step = disturbed(getattr(signal, name), at, notes / name)
    return pretrain.main(config)


def disturbed(number: signal.Signals, at: int, note: Path) -> Any:
    """Return the forward step that sends its process a signal before micro-batch `at` of this attempt."""
    calls, step = [0], gpt_step.forward_step

    def forward_step(data_iterator: Any, model: Any) -> Any:
        if calls[0] == at:
            note.touch()
            os.kill(os.getpid(), number)
        calls[0] += 1
        return step(data_iterator, model)

    return forward_step
