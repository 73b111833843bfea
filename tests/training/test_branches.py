"""A run that branches off from another one's checkpoint, with all of its state, into a folder of its own."""

from pathlib import Path
from typing import Any

import pytest

from bridge import restricted_load
from bridge.errors import CheckpointError, InputError
from bridge.ledger import DIFFERENT, compare_ledgers, ledger
from tasks.launch import launch
from training.checkpoint_choice import branching_point
from training.checkpoint_folders import complete_checkpoints
from training.config import CheckpointConfig, ConfigContainer
from training.metrics import read_metrics


@pytest.fixture(scope="module")
def train(tiny_config, imported, tmp_path_factory):
    root = tmp_path_factory.mktemp("branches")

    def start(name: str, **changes: Any) -> Path:
        overrides = {"model.hidden_dropout": 0.1, "train.eval_interval": None, **changes}
        job = {
            "config": tiny_config(**overrides).to_dict(),
            "load": str(imported),
            "output": str(root / name),
            "metrics": str(root / f"{name}.jsonl"),
        }
        launch("training.pretrain", job, folder=root / f"{name}-job", environment={"OMP_NUM_THREADS": "1"})
        return root / name

    return start


@pytest.fixture(scope="module")
def whole(train) -> Path:
    """A run of six iterations."""
    return train("whole")


def losses(run: Path) -> dict[int, float]:
    lines = read_metrics(run.with_name(f"{run.name}.jsonl"))
    return {line["iteration"]: line["loss"] for line in lines if "loss" in line}


def test_a_branch_goes_on_like_the_run_itself(train, whole) -> None:
    branch = train("branch", **{"checkpoint.load": str(whole / "iter_0000003")})
    assert losses(branch) == {number: loss for number, loss in losses(whole).items() if number > 3}
    assert [path.name for path in complete_checkpoints(branch)] == ["iter_0000006"]
    last = [ledger(run / "iter_0000006") for run in (whole, branch)]
    assert not compare_ledgers(*last).names(DIFFERENT)
    # the other run is what it was
    assert [path.name for path in complete_checkpoints(whole)] == ["iter_0000003", "iter_0000006"]
    # what a run has itself comes first
    again = train("branch", **{"checkpoint.load": str(whole / "iter_0000003"), "train.train_iters": 7})
    assert sorted(losses(again)) == [4, 5, 6, 7]
    with pytest.raises(InputError, match="another model"):
        train("other", **{"checkpoint.load": str(whole), "model.layernorm_epsilon": 0.5})


def test_a_branch_has_the_optimizer_that_its_config_asks_for(train, whole) -> None:
    settings = {"lr": 0.002, "min_lr": 0.001, "weight_decay": 0.5, "adam_beta1": 0.8, "adam_eps": 1e-6}
    changes = {f"optimizer.{name}": value for name, value in settings.items()}
    constant = {"scheduler.lr_decay_style": "constant", "train.train_iters": 4}
    slower = train("slower", **{"checkpoint.load": str(whole / "iter_0000003")}, **constant, **changes)
    lines = read_metrics(slower.with_name("slower.jsonl"))
    assert [line["learning_rate"] for line in lines] == [0.002]
    groups = restricted_load.load_common(slower / "iter_0000004")["optimizer"]["optimizer"]["param_groups"]
    for group in groups:
        assert (group["max_lr"], group["min_lr"], group["lr"]) == (0.002, 0.001, 0.002)
        assert (tuple(group["betas"]), group["eps"], group["step"]) == ((0.8, 0.95), 1e-6, 4)
        assert group["weight_decay"] == 0.5 * group["wd_mult"]


def test_a_branch_of_nothing(tmp_path: Path) -> None:
    config = ConfigContainer(checkpoint=CheckpointConfig(load=str(tmp_path / "none")))
    with pytest.raises(CheckpointError, match="none is not a folder"):
        branching_point(config)
