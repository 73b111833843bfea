"""How far two models are apart: their logits at each position of a prompt, hidden states at each layer."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bridge.gates import LogitsMetrics
from bridge.job import finite
from bridge.prompts import Prompts
from bridge.trace import LOGITS, TraceFolder

TOP = 5
POSITIONS_AT_ONCE = 32  # whole prompts would take gigabytes with a vocabulary of 150,000
Row = dict[str, Any]


class Differences:
    """Compares what one end says, as it says it, with the trace of the other; one row a position or a layer.

    `positions` has a row for each prompt and position, `layers` one for each prompt and layer that this rank
    has seen.
    """

    def __init__(self, prompts: Prompts, other: TraceFolder) -> None:
        self.prompts, self.other = prompts, other
        self.positions: list[Row] = []
        self.layers: list[Row] = []

    def compare(self, prompt: int, name: str, values: torch.Tensor) -> None:
        """Compare what was said now with what the other end said to the same prompt."""
        before, now = self.other.read(prompt, name), values.cpu()
        if name == LOGITS:
            self.positions.extend(position_rows(prompt, self.prompts[prompt], before, now))
        else:
            layer = int(name.rpartition("_")[2])
            self.layers.append({"prompt": prompt, "layer": layer, **layer_metrics(before, now)})


def position_rows(number: int, prompt: list[int], a: torch.Tensor, b: torch.Tensor) -> list[Row]:
    """Return a row of differences for every position of one prompt."""
    parts = zip(a.split(POSITIONS_AT_ONCE), b.split(POSITIONS_AT_ONCE), strict=True)
    metrics = [position_metrics(left.double(), right.double()) for left, right in parts]
    columns = {name: torch.cat([part[name] for part in metrics]).tolist() for name in metrics[0]}
    return [
        {"prompt": number, "position": position, "token": token}
        | {name: column[position] for name, column in columns.items()}
        for position, token in enumerate(prompt)
    ]


def position_metrics(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return for [positions, vocabulary] of logits in float64 one value a position for each metric."""
    difference = (a - b).abs()
    log_a, log_b = functional.log_softmax(a, -1), functional.log_softmax(b, -1)
    top = min(TOP, a.shape[-1])
    top_a, top_b = a.topk(top).indices, b.topk(top).indices
    return {
        "max_abs": difference.amax(-1),
        "mean_abs": difference.mean(-1),
        "kl": functional.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1).clamp(min=0),
        "top1": a.argmax(-1),
        "top1_other": b.argmax(-1),
        "top5_shared": (top_a[:, :, None] == top_b[:, None, :]).any(-1).double().mean(-1),
        "cosine": functional.cosine_similarity(a, b, dim=-1),
        "scale": torch.maximum(a.abs().amax(-1), b.abs().amax(-1)),
    }


def layer_metrics(a: torch.Tensor, b: torch.Tensor) -> Row:
    """Return how far [positions, hidden size] are apart: distances as shares of the longer vector.

    `worst_position` is where the largest one is.
    """
    a, b = a.float(), b.float()
    scale = torch.maximum(a.norm(dim=-1), b.norm(dim=-1))
    # where both are zero they agree
    relative = (a - b).norm(dim=-1) / torch.where(scale == 0, 1.0, scale)
    return {
        "relative": relative.max().item(),
        "relative_mean": relative.mean().item(),
        "worst_position": int(relative.argmax()),
        "max_abs": (a - b).abs().max().item(),
    }


def summarize(rows: list[Row]) -> LogitsMetrics:
    """Reduce the rows of positions to the gate's metrics; a NaN anywhere stays a NaN."""
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    return LogitsMetrics(
        max_abs=columns["max_abs"].max().item(),
        mean_abs=columns["mean_abs"].mean().item(),
        kl=columns["kl"].max().item(),
        top1_agreement=(columns["top1"] == columns["top1_other"]).double().mean().item(),
        top5_agreement=columns["top5_shared"].mean().item(),
        cosine=columns["cosine"].min().item(),
        scale=columns["scale"].max().item(),
    )


def by_layer(rows: list[Row], metric: str) -> list[float]:
    """Return the largest value of each layer over all prompts, from layer 0 on."""
    columns = torch.full((1 + max(row["layer"] for row in rows),), -1.0, dtype=torch.float64)
    for row in rows:
        # torch's maximum lets a NaN win, Python's does not
        columns[row["layer"]] = torch.maximum(
            columns[row["layer"]], torch.tensor(row[metric], dtype=torch.float64)
        )
    assert (columns != -1).all(), "a layer was seen by no rank"
    return columns.tolist()


def write_table(rows: list[Row], path: str | None) -> None:
    """Write rows as JSON lines, if a file is asked for."""
    if path is not None:
        Path(path).write_text("".join(json.dumps(finite(row)) + "\n" for row in rows))
