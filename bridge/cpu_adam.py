"""Adam for the CPU with the state layout of Transformer Engine's FusedAdam.

Megatron's distributed optimizer loses the step count of `torch.optim.Adam` on resume: torch keeps it per
parameter, FusedAdam per group (megatron/core/optimizer/distrib_optimizer.py, load_state_dict). With this
class a run on the CPU resumes bit for bit, and its optimizer state is the one that a run on GPUs has.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class CpuAdam(torch.optim.Optimizer):
    """Adam or AdamW (`adam_w_mode`) over torch's own fused CPU kernel; `step` is an int in each group."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
    ) -> None:
        # bias_correction is not read here; FusedAdam keeps it in its groups, so a checkpoint has to have it.
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Apply one update to every parameter that has a gradient."""
        assert closure is None, "Megatron Core never passes a closure"
        for group in self.param_groups:
            # An empty group counts no steps, as in FusedAdam; Megatron evens that out when it saves.
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        states = [self._state(param) for param in params]
        self.kernel(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.tensor(float(group["step"])) for _ in params],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )

    def _state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        return state
