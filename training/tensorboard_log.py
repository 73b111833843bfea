"""The metrics of a run as TensorBoard's curves."""

import importlib.util
from typing import Any

from bridge.errors import ConfigError
from training.callbacks import Callback, Step, metrics_of
from training.setup import Run

NO_CURVES = ("iteration", "train_iters", "consumed_samples")


class TensorBoardLog(Callback):
    """Writes every number of an iteration's metrics under its name, from the first rank."""

    def before_training(self, run: Run) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "logger.tensorboard_dir needs the package tensorboard, which is not installed: install it, or"
                " set logger.tensorboard_dir to null"
            )
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run wrote after its last checkpoint is hidden from this iteration on
        self.writer: Any = (
            SummaryWriter(run.config.logger.tensorboard_dir, purge_step=run.iteration + 1)
            if run.is_first_rank
            else None
        )

    def after_step(self, run: Run, step: Step) -> None:
        if self.writer is None:
            return
        for name, value in metrics_of(run, step).items():
            if name not in NO_CURVES:
                self.writer.add_scalar(name, value, run.iteration)

    def after_training(self, run: Run) -> None:
        if self.writer is not None:
            self.writer.close()
