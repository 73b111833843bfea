"""A parallel plan as a table: what each layout needs its memory and its time for."""

from dataclasses import fields
from typing import Any

from training.memory_estimate import RankMemory
from training.parallel_plan import USABLE, ParallelPlan

PARTS = tuple(field.name for field in fields(RankMemory))
COLUMNS = ("layout", "verdict", "GiB a GPU", *PARTS, "tokens/s a GPU", "time goes to")


def plan_rows(plan: ParallelPlan, count: int = 8) -> list[dict[str, Any]]:
    """Return the best layouts, and the quickest that do not fit, as rows of a table."""
    shown = [(each, "chosen" if not number else "") for number, each in enumerate(plan.fitting[:count])]
    shown += [(each, "does not fit") for each in plan.too_large[:3]]
    return [
        {
            "layout": str(each.layout),
            "verdict": verdict,
            "memory_gib": round(each.memory.total / 2**30, 1),
            **{f"{part}_gib": round(getattr(each.memory, part) / 2**30, 1) for part in PARTS},
            "seconds": _rounded(each.total_seconds),
            "tokens_per_second_per_gpu": round(plan.tokens_per_second(each)),
            "spent_on": {name: _rounded(value) for name, value in each.seconds.items() if value > 0},
        }
        for each, verdict in shown
    ]


def _rounded(seconds: float) -> float:
    """Keep four digits, also of the microseconds that a tiny model takes."""
    return float(f"{seconds:.4g}")


def plan_title(name: str, plan: ParallelPlan) -> str:
    """Say what was planned; `name` is the model's."""
    given = f"; as given: {', '.join(sorted(plan.fixed))}" if plan.fixed else ""
    return (
        f"{name} on {plan.num_gpus} x {plan.gpu.name} ({plan.gpu.memory * USABLE:.0f} GiB usable a GPU),"
        f" sequence {plan.config.model.seq_length}, global batch {plan.config.train.global_batch_size}{given}"
    )


def plan_cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows as they are shown under `COLUMNS`."""
    return [
        (
            row["layout"],
            row["verdict"],
            str(row["memory_gib"]),
            *(str(row[f"{part}_gib"]) for part in PARTS),
            f"{row['tokens_per_second_per_gpu']:,}",
            shares(row["spent_on"]),
        )
        for row in rows
    ]


def plan_text(name: str, plan: ParallelPlan) -> str:
    """Return the table as lines of text, which are neither cut nor wrapped."""
    cells = [COLUMNS, *plan_cells(plan_rows(plan))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join([plan_title(name, plan), *lines])


def shares(seconds: dict[str, float]) -> str:
    """Say what an iteration's time goes to, in percent, small shares left out."""
    total = sum(seconds.values())
    return ", ".join(
        f"{name} {value / total:.0%}" for name, value in seconds.items() if value / total >= 0.005
    )
