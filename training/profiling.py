"""A close look at a window of iterations: torch's profiler, Nsight Systems, a history of GPU memory."""

from pathlib import Path

import torch

from training.callbacks import Callback, Step
from training.config import ProfilingConfig
from training.setup import Run


def window_callbacks(profiling: ProfilingConfig) -> list[Callback]:
    """Return a callback for each tool that the config asks for."""
    return [
        *([TorchProfiler(profiling)] if profiling.use_pytorch_profiler else []),
        *([NsysWindow(profiling)] if profiling.use_nsys_profiler else []),
        *([MemoryHistory(profiling)] if profiling.record_memory_history else []),
    ]


class Window(Callback):
    """Opens before iteration `profile_step_start` and closes after the one before `profile_step_end`."""

    takes_long = True

    def __init__(self, profiling: ProfilingConfig) -> None:
        self.profiling = profiling
        self.is_open = False

    def before_training(self, run: Run) -> None:
        self.move_on(run)

    def after_step(self, run: Run, step: Step) -> None:
        self.move_on(run)

    def move_on(self, run: Run) -> None:
        if torch.distributed.get_rank() not in self.profiling.profile_ranks:
            return
        coming = run.iteration + 1
        self.set(self.profiling.profile_step_start <= coming < self.profiling.profile_step_end)

    def after_training(self, run: Run) -> None:
        self.set(False)

    def set(self, inside: bool) -> None:
        """Open or close where that is a change."""
        if inside and not self.is_open:
            self.open()
        elif self.is_open and not inside:
            self.close()
        self.is_open = inside

    def open(self) -> None:
        """Begin to look."""

    def close(self) -> None:
        """Stop looking and write down what was seen."""

    def file(self, name: str) -> Path:
        """Return where this rank writes."""
        folder = Path(str(self.profiling.output))
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"rank{torch.distributed.get_rank()}.{name}"


class TorchProfiler(Window):
    """Writes a trace for chrome://tracing or Perfetto, and a table of the operations that took longest."""

    def open(self) -> None:
        self.profiler = torch.profiler.profile()
        self.profiler.start()

    def close(self) -> None:
        self.profiler.stop()
        on_gpu = torch.cuda.is_available()
        table = self.profiler.key_averages().table(
            sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=60
        )
        self.file("operations.txt").write_text(table)
        self.profiler.export_chrome_trace(str(self.file("trace.json.gz")))


class NsysWindow(Window):
    """Marks the window for `nsys profile --capture-range=cudaProfilerApi`, every operation with its name."""

    def open(self) -> None:
        torch.cuda.profiler.start()
        self.ranges = torch.autograd.profiler.emit_nvtx()
        self.ranges.__enter__()

    def close(self) -> None:
        self.ranges.__exit__(None, None, None)
        torch.cuda.profiler.stop()


class MemoryHistory(Window):
    """Writes every allocation of the window with its stack, for https://pytorch.org/memory_viz.

    An error ends the window: the memory that was too little is what the history is looked at for.
    """

    def open(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=200_000)

    def close(self) -> None:
        torch.cuda.memory._dump_snapshot(str(self.file("memory.pickle")))
        torch.cuda.memory._record_memory_history(enabled=None)

    def after_failure(self, run: Run) -> None:
        self.set(False)
