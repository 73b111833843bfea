"""Iterations that must not change the model: a loss or gradient that is no number, a loss that jumps up."""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer

from bridge.errors import DivergenceError
from training.config import ResilienceConfig

if TYPE_CHECKING:
    from training.setup import Run

NAN, SPIKE = "nan", "spike"
STOP, SKIP, IGNORE = "stop", "skip", "ignore"
SHOWN = 3


@dataclass(frozen=True)
class Fault:
    """What is wrong with an iteration, and what the config says about it: stop, skip or ignore."""

    kind: str
    policy: str
    text: str


class Faults:
    """Judges iterations by their loss and gradient norm, which every rank knows alike.

    A spike is a loss above `spike_factor` times the median of the last `spike_window` losses, once there are
    `spike_warmup_iters` of them; iterations that are left out are not among them.
    """

    def __init__(self, config: ResilienceConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.seen = self.skipped = self.spikes = self.in_a_row = 0

    def judge(self, loss: float, grad_norm: float | None) -> Fault | None:
        """Return what is wrong, if anything is; a norm of None is that of fp16 gradients that overflowed."""
        fault = self._find(loss, grad_norm)
        if fault is None or fault.policy == IGNORE:
            self.losses.append(loss)
            self.seen += 1
        self.spikes += fault is not None and fault.kind == SPIKE
        skips = fault is not None and fault.policy == SKIP
        self.skipped += skips
        self.in_a_row = self.in_a_row + 1 if skips else 0
        return fault

    @property
    def too_many(self) -> bool:
        """Say whether more iterations in a row have been skipped than may be."""
        return self.in_a_row > self.config.max_skipped

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to judge like one that was not interrupted."""
        counts = {"seen": self.seen, "skipped": self.skipped, "spikes": self.spikes}
        return {"losses": list(self.losses), "in_a_row": self.in_a_row, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, with as many of its losses as this config looks back at."""
        self.losses = deque(state["losses"], maxlen=self.config.spike_window)
        self.seen, self.skipped, self.spikes = (state[name] for name in ("seen", "skipped", "spikes"))
        self.in_a_row = state["in_a_row"]

    def _find(self, loss: float, grad_norm: float | None) -> Fault | None:
        config = self.config
        if not math.isfinite(loss):
            return Fault(NAN, config.on_nan, f"the loss is {loss}")
        if grad_norm is not None and not math.isfinite(grad_norm):
            return Fault(NAN, config.on_nan, f"the gradient norm is {grad_norm}")
        if self.seen < config.spike_warmup_iters or not self.losses:
            return None
        median = statistics.median(self.losses)
        if loss <= config.spike_factor * median:
            return None
        text = (
            f"the loss is {loss:.4g}, more than {config.spike_factor:g} times the recent median {median:.4g}"
        )
        return Fault(SPIKE, config.on_spike, text)


class RefusableOptimizer(ChainedOptimizer):
    """Megatron's optimizer with a say in each update, when the gradient norm is known and nothing changed."""

    def step(self, accepts: Callable[[float], bool]) -> tuple[bool, float | None, int | None]:
        """Update if `accepts` says so of the gradient norm; not asked when fp16 gradients overflowed."""
        self._accepts = accepts
        return super().step()

    def get_grad_norm(self) -> float:
        self._grad_norm = float(super().get_grad_norm())
        return self._grad_norm

    def step_with_ready_grads(self) -> bool:
        return self._accepts(self._grad_norm) and super().step_with_ready_grads()


@dataclass(frozen=True)
class Update:
    """What came of an iteration's gradients; `loss` is the mean over its tokens."""

    loss: float
    grad_norm: float | None
    updated: bool
    fault: Fault | None


def update(run: "Run", results: list[dict[str, torch.Tensor]], sums: torch.Tensor) -> Update:
    """Change the model by its gradients unless the iteration is at fault; all ranks decide alike.

    `results` are this rank's micro-batches and `sums` the loss and tokens of all ranks. The host waits for
    the GPU when the gradient norm is asked for; the loss is there by then. Raises DivergenceError, with the
    model unchanged, where the config says stop or too much has been skipped.
    """
    judged: list[tuple[float, Fault | None]] = []

    def accepts(grad_norm: float | None) -> bool:
        total, num_tokens = sums.tolist()
        loss = total / num_tokens if num_tokens else math.nan
        fault = run.faults.judge(loss, grad_norm)
        judged.append((loss, fault))
        return fault is None or fault.policy == IGNORE

    updated, grad_norm, _ = run.optimizer.step(accepts)
    if not judged:
        accepts(None)
    loss, fault = judged[0]
    if fault is not None:
        answer(run, fault, results)
    return Update(loss, grad_norm, updated, fault)


def answer(run: "Run", fault: Fault, results: list[dict[str, torch.Tensor]]) -> None:
    """Say what is wrong and where; raise DivergenceError if the run cannot go on."""
    text = (
        f"iteration {run.iteration + 1}: {fault.text}{whereabouts(run, results) if fault.kind == NAN else ''}"
    )
    first = run.consumed_samples
    text += f"; its samples are {first} to {first + run.config.train.global_batch_size - 1} of the run"
    if fault.policy == STOP:
        raise DivergenceError(
            f"{text}. Nothing was updated or saved: look at this text, lower optimizer.lr, or leave such"
            f" iterations out by resilience.on_{fault.kind}=skip"
        )
    if run.faults.too_many:
        raise DivergenceError(
            f"{text}. That is number {run.faults.in_a_row} in a row that was skipped, and"
            f" resilience.max_skipped is {run.config.resilience.max_skipped}: go on from an earlier"
            " checkpoint with a lower optimizer.lr or other text"
        )
    if run.is_first_rank:
        print(f"{text}; {'skipped' if fault.policy == SKIP else 'taken all the same'}", flush=True)


def whereabouts(run: "Run", results: list[dict[str, torch.Tensor]]) -> str:
    """Name the first rank with a loss that is no number and its micro-batches, else with such gradients.

    A collective. Ranks have only their own shard of the sums over data parallelism: the rest of a buffer is
    still what the rank computed itself, so the one that spoiled the sums has the most of what is no number.
    """
    batches = [number for number, result in enumerate(results) if not result["loss"].isfinite()]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    mine = (parallel_state.get_data_parallel_rank(), batches, bad_gradients(run))
    torch.distributed.all_gather_object(found, mine)
    for rank, (copy, numbers, _) in enumerate(found):
        if numbers:
            samples = [samples_of(run, copy, number) for number in numbers]
            return f" from rank {rank}, in micro-batches with samples {shown(samples)}"
    rank = max(range(len(found)), key=lambda rank: len(found[rank][2]))
    names = found[rank][2]
    return f" from gradients, most on rank {rank}: {shown(names)}" if names else ""


def samples_of(run: "Run", copy: int, number: int) -> str:
    """Return the numbers in the run of the samples of one micro-batch."""
    size = run.config.train.micro_batch_size
    batch = number * parallel_state.get_data_parallel_world_size() + copy
    first = run.consumed_samples + batch * size
    return f"{first}-{first + size - 1}"


def bad_gradients(run: "Run") -> list[str]:
    """Return the parameters of this rank whose gradients are no numbers."""
    return [
        name
        for chunk in run.model
        for name, parameter in chunk.module.named_parameters()
        if parameter.requires_grad and not parameter.main_grad.isfinite().all()
    ]


def shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
