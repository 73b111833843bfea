import pytest
import torch

from bridge.cpu_adam import CpuAdam


@pytest.mark.parametrize(("adam_w_mode", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_updates_are_bitwise_those_of_torch(adam_w_mode: bool, reference: type[torch.optim.Adam]) -> None:
    start = torch.randn(4, 5)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    optimizers = (
        CpuAdam([ours], adam_w_mode=adam_w_mode, **settings),
        reference([theirs], fused=True, **settings),
    )
    for _ in range(5):
        ours.grad = torch.randn(4, 5)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_state_has_the_layout_of_fused_adam() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.float32))
    optimizer = CpuAdam([{"params": [parameter]}, {"params": []}])
    parameter.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state_dict()
    assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq"}
    assert state["param_groups"][0]["step"] == 1
    assert "step" not in state["param_groups"][1]
