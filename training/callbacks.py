"""What happens around the iterations of a run: metrics, validation, stopping."""

import gc
import math
import signal
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

from training import fp8_state
from training.faults import SKIP, Fault
from training.heartbeat import EVALUATION, BeatingData
from training.pipeline import highest_of_all_ranks, run_batch, sums_of_all_ranks
from training.setup import Run, iterators, whole_parameters
from training.throughput import throughput


@dataclass(frozen=True)
class Step:
    """What one iteration came to, known to every rank; `loss` is the mean over its tokens."""

    loss: float
    learning_rate: float
    # None: the gradients overflowed in fp16, and nothing was updated
    grad_norm: float | None
    seconds: float
    # what is wrong with the iteration, and whether it was left out for it
    fault: Fault | None = None
    # seconds by part, as the stopwatch names them
    spans: dict[str, float] = field(default_factory=dict)
    # of the experts' balance and of prediction layers, if the model has them
    side_losses: dict[str, float] = field(default_factory=dict)

    @property
    def is_skipped(self) -> bool:
        """Say whether the iteration was left out."""
        return self.fault is not None and self.fault.policy == SKIP


class Callback:
    """Does something before the first iteration and after each one, on every rank."""

    # whether it may take longer than the hang timeout
    takes_long = False

    def before_training(self, run: Run) -> None:
        """Prepare; the run has been loaded."""

    def after_step(self, run: Run, step: Step) -> None:
        """Look at the iteration that has just ended."""

    def after_training(self, run: Run) -> None:
        """Tidy up after the last iteration, unless an error ended the run."""

    def after_failure(self, run: Run) -> None:
        """End what goes on beside training, as this rank has failed and the others may be anywhere."""


class MetricsLog(Callback):
    """Writes the numbers of every iteration to where the metrics go, and prints a line now and then."""

    def before_training(self, run: Run) -> None:
        if run.is_first_rank:
            run.metrics.open(run.config.logger, run.iteration)

    def after_step(self, run: Run, step: Step) -> None:
        line = metrics_of(run, step)
        run.metrics.write(run.iteration, line)
        if run.is_first_rank and is_due(run, run.config.logger.log_interval):
            print(
                f"iteration {run.iteration}/{run.config.train.train_iters}: loss {step.loss:.4f},"
                f" learning rate {step.learning_rate:.2e}, {norm_of(step)},"
                f" {line['tokens_per_second']:.0f} tokens/s, {line['tflops_per_gpu']:.3g} TFLOP/s a rank",
                flush=True,
            )

    def after_training(self, run: Run) -> None:
        run.metrics.close()

    def after_failure(self, run: Run) -> None:
        run.metrics.close()


class Validation(Callback):
    """Measures the loss on held-out text, on the same samples every time."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def after_step(self, run: Run, step: Step) -> None:
        if not is_due(run, run.config.train.eval_interval):
            return
        loss = validation_loss(run, self.dataset)
        run.metrics.write(run.iteration, {"validation_loss": loss})
        if run.is_first_rank:
            print(f"iteration {run.iteration}: validation loss {loss:.4f}", flush=True)


class StopOnSignal(Callback):
    """Ends the run after the iteration in which any rank got SIGTERM."""

    def __init__(self) -> None:
        self.received = False
        self.handler_before: Any = None

    def before_training(self, run: Run) -> None:
        self.handler_before = signal.signal(signal.SIGTERM, self.note)

    def note(self, number: int, frame: Any) -> None:
        self.received = True

    def after_step(self, run: Run, step: Step) -> None:
        run.should_stop = highest_of_all_ranks(self.received) > 0

    def after_training(self, run: Run) -> None:
        self.restore()

    def after_failure(self, run: Run) -> None:
        self.restore()

    def restore(self) -> None:
        """Leave SIGTERM to whoever had it before the run."""
        if self.handler_before is not None:
            signal.signal(signal.SIGTERM, self.handler_before)


class GarbageCollection(Callback):
    """Collects Python's garbage at fixed iterations, so that no rank pauses while the others wait for it.

    What is there before the first one, imported modules above all, is not looked at again.
    """

    def before_training(self, run: Run) -> None:
        gc.disable()
        gc.collect()
        gc.freeze()

    def after_step(self, run: Run, step: Step) -> None:
        if run.iteration % run.config.train.manual_gc_interval == 0:
            gc.collect()

    def after_training(self, run: Run) -> None:
        gc.unfreeze()
        gc.enable()


def is_due(run: Run, interval: int | None) -> bool:
    """Say whether something that happens every `interval` iterations, and at the end, happens now."""
    at_end = run.iteration == run.config.train.train_iters
    return at_end or (interval is not None and run.iteration % interval == 0)


def metrics_of(run: Run, step: Step) -> dict[str, Any]:
    """Return the numbers of the iteration that has just ended; all ranks ask together."""
    train = run.config.train
    return {
        "train_iters": train.train_iters,
        **({"loss": step.loss} if math.isfinite(step.loss) else {}),
        **{name: loss for name, loss in step.side_losses.items() if math.isfinite(loss)},
        "learning_rate": step.learning_rate,
        **(
            {"grad_norm": step.grad_norm}
            if step.grad_norm is not None and math.isfinite(step.grad_norm)
            else {}
        ),
        **({"loss_scale": run.optimizer.get_loss_scale().item()} if run.config.mixed_precision.fp16 else {}),
        **({step.fault.kind: 1, "skipped": int(step.is_skipped)} if step.fault is not None else {}),
        "seconds": step.seconds,
        "consumed_samples": run.consumed_samples,
        **throughput(run, step),
    }


def norm_of(step: Step) -> str:
    return f"gradient norm {step.grad_norm:.3f}" if step.grad_norm is not None else "gradients overflowed"


@torch.no_grad()
def validation_loss(run: Run, dataset: Any) -> float:
    """Return the mean loss over the first `eval_iters` global batches of `dataset`."""
    train = run.config.train
    for chunk in run.model:
        chunk.eval()
    with whole_parameters(run), fp8_state.unchanged(run.model):
        results = run_batch(
            run.forward_step,
            run.model,
            [BeatingData(batches, run.heart, EVALUATION) for batches in iterators(run, dataset, 0)],
            num_microbatches=get_num_microbatches() * train.eval_iters,
            micro_batch_size=train.micro_batch_size,
            seq_length=run.config.model.seq_length,
            forward_only=True,
        )
    for chunk in run.model:
        chunk.train()
    total, num_tokens = sums_of_all_ranks(results).tolist()
    return total / num_tokens
