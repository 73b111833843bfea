"""The picture of a comparison: how far two models are apart, by position and by layer."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandera.typing import DataFrame

LEGEND_PROMPTS = 8  # more lines than these are not told apart by a legend
SMALLEST = 1e-9  # below float32's resolution; zero has no place on a logarithmic axis


def draw_differences(
    positions: "DataFrame", layers: "DataFrame", verdicts: list[dict[str, Any]], path: Path
) -> None:
    """Draw the tables `Logits` and `Layers` as a PNG, a line a prompt, with the thresholds of the gates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gates = {each["gate"]: each for each in verdicts}
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    scale = gates["logits"]["metrics"]["scale"]
    # thresholds of absolute differences are shares of the scale
    shares = positions.assign(share=positions["max_abs"] / scale)
    _lines(left, shares, "position", "share", gates["logits"]["thresholds"]["max_abs"] / scale)
    left.set(title="Logits", xlabel="position", ylabel="largest difference / largest logit")
    [(metric, bound)] = gates["hidden_states"]["thresholds"].items()
    _lines(right, layers, "layer", metric, bound, marker="o")
    right.set(title="Hidden states", xlabel="layer (0: before the first)", ylabel="relative distance")
    right.xaxis.get_major_locator().set_params(integer=True)
    if (parts_at := gates["hidden_states"]["parts_at"]) is not None:
        right.axvline(parts_at, color="tab:red", linewidth=1, label=f"parts at {parts_at}")
    right.legend(fontsize="small")
    figure.suptitle(f"{gates['logits']['dtype']}: {'passed' if _passed(verdicts) else 'FAILED'}")
    figure.savefig(path, metadata={"Software": None})


def _lines(
    axes: "Axes", rows: "DataFrame", column: str, value: str, threshold: float, marker: str = ""
) -> None:
    # what is no number, or has no end, has no place on an axis
    shown = rows[value].clip(lower=SMALLEST).where(rows[value].map(math.isfinite))
    heights = [each for each in (*shown, threshold) if math.isfinite(each)] or [SMALLEST]
    axes.set(yscale="log", ylim=(min(heights) / 3, max(heights) * 3))
    axes.grid(alpha=0.3)
    groups = rows.groupby("prompt")
    for prompt, group in groups:
        label = f"prompt {prompt}" if len(groups) <= LEGEND_PROMPTS else None
        axes.plot(group[column], shown[group.index], linewidth=1, marker=marker, markersize=3, label=label)
    axes.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"allowed: {threshold:.2g}")


def _passed(verdicts: list[dict[str, Any]]) -> bool:
    return all(each["passed"] for each in verdicts)
