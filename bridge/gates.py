"""The gates on logits and hidden states: which differences of two computations of one model are rounding.

Every threshold that depends on a dtype stands here.
"""

import math
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
    """The most that metrics of the same name may be; those of absolute differences as shares of the scale.

    Agreement of the top tokens and cosine are measured and not judged: no fault moved them that did not move
    one of these first, and equal candidates for the next token change places by rounding alone
    (docs/how_conversion_works.md).
    """

    max_abs: float
    mean_abs: float
    kl: float


LOGITS_THRESHOLDS = {
    # A real model of 1.5 billion parameters differs by 2e-6 of its scale, tiny ones by less.
    "float32": LogitsThresholds(max_abs=1e-4, mean_abs=1e-5, kl=1e-5),
    # With 8 bits the two sides round differently at every layer: tiny models differ by 2e-2 of their scale.
    "bfloat16": LogitsThresholds(max_abs=5e-2, mean_abs=1e-2, kl=2e-2),
    # Where two experts are nearly equal, rounding alone chooses the other one for a token, and its logits are
    # others: tiny models with random weights differ by a third of their scale at single positions. Only what
    # changes most positions is seen; compare mixtures of experts in float32.
    "bfloat16 with experts": LogitsThresholds(max_abs=1.0, mean_abs=2e-2, kl=0.5),
}


@dataclass(frozen=True)
class HiddenThreshold:
    """The most that `metric`, "relative" or "relative_mean" of a layer's positions, may be at any layer."""

    metric: str
    bound: float


# Distances of two hidden states as shares of the longer one. Without a fault 40 layers of random weights are
# 1e-6 apart in float32 and 3e-2 in bfloat16.
HIDDEN_THRESHOLDS = {
    "float32": HiddenThreshold("relative", 1e-4),
    "bfloat16": HiddenThreshold("relative", 1e-1),
    "bfloat16 with experts": HiddenThreshold("relative_mean", 1e-1),
}
DTYPES = ("float32", "bfloat16")
ABSOLUTE = ("max_abs", "mean_abs")


def check_dtype(dtype: str) -> None:
    """Refuse a dtype in which no gate can judge."""
    if dtype not in DTYPES:
        raise ConfigError(f"no logits gate for dtype {dtype!r}: allowed are {', '.join(DTYPES)}")


def case_of(dtype: str, experts: bool) -> str:
    """Return the name under which the thresholds stand for a dtype in which both sides compute."""
    check_dtype(dtype)
    return f"{dtype} with experts" if experts and dtype != "float32" else dtype


def judge_logits(metrics: LogitsMetrics, case: str) -> dict[str, Any]:
    """Return the gate's verdict as JSON values: passed, metrics, thresholds and a line for each failure."""
    bounds = asdict(LOGITS_THRESHOLDS[case])
    bounds.update({name: bounds[name] * metrics.scale for name in ABSOLUTE})
    found = asdict(metrics)
    failures = [
        f"{name} is {found[name]:.3g}: it may be at most {bound:.3g}"
        for name, bound in bounds.items()
        if not within(found[name], bound)
    ]
    return {"passed": not failures, "metrics": found, "thresholds": bounds, "failures": failures}


def judge_hidden_states(relative: list[float], case: str) -> dict[str, Any]:
    """Return the verdict on the difference of each layer, from the first one's input (0) on.

    `parts_at` is the first layer over the threshold, None if there is none.
    """
    metric, bound = HIDDEN_THRESHOLDS[case].metric, HIDDEN_THRESHOLDS[case].bound
    over = [layer for layer, value in enumerate(relative) if not within(value, bound)]
    last = len(relative) - 1
    failures = [
        f"hidden states part {place_of(layer, last)}: by {relative[layer]:.3g} of their length,"
        f" which may be at most {bound:.3g}"
        for layer in over[:1]
    ]
    return {
        "passed": not over,
        # max() would pass over a NaN
        "metrics": {metric: math.nan if any(map(math.isnan, relative)) else max(relative)},
        "thresholds": {metric: bound},
        "failures": failures,
        "parts_at": over[0] if over else None,
        "num_layers": last,
        "by_layer": relative,
    }


def place_of(layer: int, num_layers: int) -> str:
    """Say where in a model a hidden state is; 0 is what the first layer is given."""
    return f"at layer {layer} of {num_layers}" if layer else f"before layer 1 of {num_layers}"


def within(value: float, bound: float) -> bool:
    """Say whether a measure keeps its bound; a value that is not a number never does."""
    return value <= bound
