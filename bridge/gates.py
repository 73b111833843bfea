"""The gates on logits and hidden states: which differences of two computations of one model are rounding.

Every threshold that depends on a dtype stands here.
"""

from dataclasses import asdict, dataclass
from typing import Any

from bridge.errors import ConfigError


@dataclass(frozen=True)
class LogitsMetrics:
    """Differences of two sets of logits over all prompts and positions.

    `kl` is the largest divergence and `cosine` the smallest similarity of any position; the agreements are
    means. `scale` is the largest absolute logit: rounding errors are proportional to it.
    """

    max_abs: float
    mean_abs: float
    kl: float
    top1_agreement: float
    top5_agreement: float
    cosine: float
    scale: float


@dataclass(frozen=True)
class LogitsThresholds:
    """Bounds for the metrics of the same name; those of absolute differences are shares of the scale."""

    max_abs: float
    mean_abs: float
    kl: float
    top1_agreement: float
    top5_agreement: float
    cosine: float


LOGITS_THRESHOLDS = {
    # A real model of 1.5 billion parameters differs by 2e-6 of its scale, tiny ones by less.
    "float32": LogitsThresholds(
        max_abs=1e-4, mean_abs=1e-5, kl=1e-5, top1_agreement=0.99, top5_agreement=0.99, cosine=0.99999
    ),
    # With 8 bits the two sides round differently at every layer: tiny models differ by 1e-2 of their scale,
    # cosine 0.9999. Close candidates for the next token change places.
    "bfloat16": LogitsThresholds(
        max_abs=5e-2, mean_abs=1e-2, kl=2e-2, top1_agreement=0.9, top5_agreement=0.9, cosine=0.999
    ),
}
# Distance of two hidden states as a share of the longer one, at any position of any layer.
HIDDEN_THRESHOLDS = {"float32": 1e-4, "bfloat16": 5e-2}
ABSOLUTE = ("max_abs", "mean_abs")
AT_LEAST = ("top1_agreement", "top5_agreement", "cosine")


def thresholds_for(dtype: str) -> LogitsThresholds:
    """Return the thresholds of a dtype in which both sides compute."""
    if dtype not in LOGITS_THRESHOLDS:
        raise ConfigError(f"no logits gate for dtype {dtype!r}: allowed are {', '.join(LOGITS_THRESHOLDS)}")
    return LOGITS_THRESHOLDS[dtype]


def judge_logits(metrics: LogitsMetrics, dtype: str) -> dict[str, Any]:
    """Return the gate's verdict as JSON values: passed, metrics, thresholds and a line for each failure."""
    bounds = asdict(thresholds_for(dtype))
    bounds.update({name: bounds[name] * metrics.scale for name in ABSOLUTE})
    failures = [
        f"{name} is {value:.3g}: it may be {'at least' if name in AT_LEAST else 'at most'} {bounds[name]:.3g}"
        for name, value in asdict(metrics).items()
        if name in bounds and not within(name, value, bounds[name])
    ]
    return {"passed": not failures, "metrics": asdict(metrics), "thresholds": bounds, "failures": failures}


def judge_hidden_states(relative: list[float], dtype: str) -> dict[str, Any]:
    """Return the verdict on the largest difference of each layer, from the first one's input (0) on.

    `parts_at` is the first layer over the threshold, None if there is none.
    """
    bound = HIDDEN_THRESHOLDS[dtype]
    over = [layer for layer, value in enumerate(relative) if not within("relative", value, bound)]
    last = len(relative) - 1
    failures = [
        f"hidden states part {place_of(layer, last)}: by {relative[layer]:.3g} of their length,"
        f" which may be at most {bound:.3g}"
        for layer in over[:1]
    ]
    # max() would pass over a NaN
    worst = next((relative[layer] for layer in over if relative[layer] != relative[layer]), max(relative))
    return {
        "passed": not over,
        "metrics": {"relative": worst},
        "thresholds": {"relative": bound},
        "failures": failures,
        "parts_at": over[0] if over else None,
        "num_layers": last,
        "by_layer": relative,
    }


def place_of(layer: int, num_layers: int) -> str:
    """Say where in a model a hidden state is; 0 is what the first layer is given."""
    return f"at layer {layer} of {num_layers}" if layer else f"before layer 1 of {num_layers}"


def within(name: str, value: float, bound: float) -> bool:
    """Say whether a metric keeps its bound; a value that is not a number never does."""
    return value >= bound if name in AT_LEAST else value <= bound
