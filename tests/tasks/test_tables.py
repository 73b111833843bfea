"""The tables: good rows pass, bad ones are named."""

import json

import pytest

from tasks.errors import ArtifactError
from tasks.tables import Layers, LedgerTable, Logits, check_metrics, checked

SIDE = {"file": "model.safetensors", "offset": 8, "shape": "[4, 2]", "dtype": "bfloat16", "sha256": "a" * 64}
LEDGER_ROW = {
    "name": "lm_head.weight",
    "rule": "OutputMapping output_layer.weight",
    "state": "equal",
    **{f"{name}_{end}": value for end in "ab" for name, value in SIDE.items()},
}
LAYER_ROW = {
    "prompt": 0,
    "layer": 3,
    "relative": float("nan"),
    "relative_mean": float("nan"),
    "worst_position": 0,
    "max_abs": float("nan"),
}


def metrics_file(tmp_path, **changes):
    rows = [
        {
            "iteration": number,
            "loss": 5.0 - number,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 100.0,
            "consumed_samples": 4 * number,
            "time": 1.7e9,
        }
        for number in (1, 2, 3)
    ]
    rows[1] |= changes
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_good_metrics_give_first_and_last_loss(tmp_path) -> None:
    assert check_metrics(metrics_file(tmp_path)) == {"first_loss": 4.0, "last_loss": 2.0}


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"loss": float("nan")}, "loss"),
        ({"loss": float("inf")}, "finite"),
        ({"grad_norm": -1.0}, "grad_norm"),
        ({"iteration": 9}, "no iteration left out"),
    ],
)
def test_bad_metrics_are_named(tmp_path, changes, check) -> None:
    with pytest.raises(ArtifactError, match=check):
        check_metrics(metrics_file(tmp_path, **changes))


def test_empty_metrics(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="no iterations"):
        check_metrics(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "change",
    [{"sha256_a": "short", "sha256_b": "short"}, {"dtype_b": "F8"}, {"name": ""}, {"state": "similar"}],
)
def test_bad_ledger(change) -> None:
    checked(LedgerTable, [LEDGER_ROW], "ledger")
    with pytest.raises(ArtifactError, match=next(iter(change))):
        checked(LedgerTable, [{**LEDGER_ROW, **change}], "ledger")


def test_a_tensor_of_one_end_is_a_row() -> None:
    row = {**LEDGER_ROW, "state": "only in a", **{f"{name}_b": None for name in SIDE}}
    checked(LedgerTable, [row], "ledger")


def test_tensors_of_two_digests_are_not_equal() -> None:
    with pytest.raises(ArtifactError, match="equal means equal digests"):
        checked(LedgerTable, [{**LEDGER_ROW, "sha256_b": "b" * 64}], "ledger")


def test_repeated_tensor() -> None:
    with pytest.raises(ArtifactError, match="LedgerTable"):
        checked(LedgerTable, [LEDGER_ROW, LEDGER_ROW], "ledger")


def test_logits_of_a_broken_model_are_a_table() -> None:
    row = {"prompt": 0, "position": 0, "token": 1, "max_abs": float("nan"), "mean_abs": float("nan")}
    row |= {"kl": float("nan"), "top1": 3, "top1_other": 4, "top5_shared": 0.2, "cosine": float("nan")}
    checked(Logits, [row], "logits")
    with pytest.raises(ArtifactError, match="position"):
        checked(Logits, [{**row, "position": -1}], "logits")


def test_layers_of_a_broken_model_are_a_table() -> None:
    checked(Layers, [LAYER_ROW], "layers")
    with pytest.raises(ArtifactError, match="Layers"):
        checked(Layers, [LAYER_ROW, LAYER_ROW], "layers")
