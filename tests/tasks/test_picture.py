"""The picture of a comparison, also of one in which nothing is a number."""

from pathlib import Path

import matplotlib.image
import pytest

from tasks.picture import draw_differences
from tasks.tables import Layers, Logits, checked


def verdicts(parts_at: int | None, scale: float) -> list[dict]:
    logits = {"metrics": {"scale": scale}, "thresholds": {"max_abs": 1e-4 * scale}, "dtype": "float32"}
    hidden = {"thresholds": {"relative": 1e-4}, "parts_at": parts_at}
    passed = parts_at is None
    return [
        {"gate": "logits", "passed": passed, **logits},
        {"gate": "hidden_states", "passed": passed, **hidden},
    ]


@pytest.mark.parametrize("value", [0.0, 1e-3, float("nan"), float("inf")])
def test_draws_positions_and_layers(value: float, tmp_path: Path) -> None:
    about = {"top1": 1, "top1_other": 1, "top5_shared": 1.0, "cosine": 1.0, "mean_abs": 0.0, "kl": 0.0}
    positions = [{"prompt": 0, "position": n, "token": 1, "max_abs": value, **about} for n in range(3)]
    share = value if value < 1 else float("nan")
    layers = [
        {"prompt": 0, "layer": n, "relative": share, "relative_mean": share}
        | {"worst_position": 0, "max_abs": value}
        for n in range(3)
    ]
    parts_at = 0 if value else None
    draw_differences(
        checked(Logits, positions, "positions"),
        checked(Layers, layers, "layers"),
        verdicts(parts_at, scale=3.0 + value),
        tmp_path / "differences.png",
    )
    assert matplotlib.image.imread(tmp_path / "differences.png").std() > 0
