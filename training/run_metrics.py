"""Where the numbers of a run go: its metrics file and TensorBoard's curves, all of them to both."""

from pathlib import Path
from typing import Any

from training.config import LoggerConfig
from training.metrics import append_metrics, close_torn_line

NO_CURVES = ("train_iters", "consumed_samples")


class RunMetrics:
    """Writes numbers as the config says, from the first rank, which alone opens it; nowhere on the others."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._curves: Any = None

    def open(self, config: LoggerConfig, iteration: int) -> None:
        """Begin after `iteration`; what a killed run wrote about later ones is taken back."""
        if config.metrics_path is not None:
            self._file = Path(config.metrics_path)
            if self._file.is_file():
                close_torn_line(self._file)
                append_metrics(self._file, {"resumed_at": iteration})
        if config.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # a second, for those who want it

            self._curves = SummaryWriter(config.tensorboard_dir, purge_step=iteration + 1)

    def write(self, iteration: int, values: dict[str, Any]) -> None:
        """Add numbers of an iteration; texts have no curve."""
        if self._file is not None:
            append_metrics(self._file, {"iteration": iteration, **values})
        if self._curves is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and name not in NO_CURVES:
                    self._curves.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Let TensorBoard see what is there; more may follow after `open`."""
        if self._curves is not None:
            self._curves.close()
        self._file = self._curves = None
