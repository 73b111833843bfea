"""The tables that pass between jobs and tasks, as pandera schemas: checked when written and when read."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pandera.pandas as pa
from pandera.errors import SchemaError, SchemaErrors

from bridge.dtypes import WEIGHT_DTYPES
from bridge.ledger import EQUAL, STATES
from tasks.errors import ArtifactError
from training.metrics import read_metrics

if TYPE_CHECKING:
    from pandera.typing import DataFrame


class Metrics(pa.DataFrameModel):
    """One row an iteration of a training run."""

    iteration: int = pa.Field(ge=1, unique=True)
    loss: float = pa.Field(nullable=False)
    learning_rate: float = pa.Field(ge=0)
    # none where fp16 gradients overflowed
    grad_norm: float = pa.Field(ge=0, nullable=True)
    tokens_per_second: float = pa.Field(gt=0)
    consumed_samples: int = pa.Field(ge=1)

    class Config:
        coerce = True

    @pa.check("loss", name="finite")
    @classmethod
    def _finite(cls, loss: pd.Series) -> pd.Series:
        return loss.map(math.isfinite)

    @pa.check("iteration", name="no iteration left out")
    @classmethod
    def _complete(cls, iteration: pd.Series) -> bool:
        return bool((iteration.diff().dropna() == 1).all())


DIGEST = r"^[0-9a-f]{64}$"


class LedgerTable(pa.DataFrameModel):
    """One row a tensor, in Hugging Face's names: where it lies and what it holds at each of two ends.

    Columns of an end that has no such tensor are empty.
    """

    name: str = pa.Field(unique=True, str_length={"min_value": 1})
    rule: str
    state: str = pa.Field(isin=list(STATES))
    file_a: str = pa.Field(nullable=True)
    offset_a: pd.Int64Dtype = pa.Field(ge=0, nullable=True)
    shape_a: str = pa.Field(nullable=True)
    dtype_a: str = pa.Field(isin=list(WEIGHT_DTYPES), nullable=True)
    sha256_a: str = pa.Field(str_matches=DIGEST, nullable=True)
    file_b: str = pa.Field(nullable=True)
    offset_b: pd.Int64Dtype = pa.Field(ge=0, nullable=True)
    shape_b: str = pa.Field(nullable=True)
    dtype_b: str = pa.Field(isin=list(WEIGHT_DTYPES), nullable=True)
    sha256_b: str = pa.Field(str_matches=DIGEST, nullable=True)

    class Config:
        coerce = True

    @pa.dataframe_check(name="equal means equal digests")
    @classmethod
    def _state_is_true(cls, frame: pd.DataFrame) -> pd.Series:
        return (frame["state"] != EQUAL) | (frame["sha256_a"] == frame["sha256_b"])


class Logits(pa.DataFrameModel):
    """One row a position of a prompt: how far two models' logits are apart."""

    prompt: int = pa.Field(ge=0)
    position: int = pa.Field(ge=0)
    token: int = pa.Field(ge=0)
    # a broken model's differences are no numbers, which is for the gate to say
    max_abs: float = pa.Field(ge=0, nullable=True)
    mean_abs: float = pa.Field(ge=0, nullable=True)
    kl: float = pa.Field(ge=0, nullable=True)
    top1: int = pa.Field(ge=0)
    top1_other: int = pa.Field(ge=0)
    top5_shared: float = pa.Field(in_range={"min_value": 0, "max_value": 1})
    cosine: float = pa.Field(in_range={"min_value": -1.001, "max_value": 1.001}, nullable=True)

    class Config:
        coerce = True
        unique = ("prompt", "position")


class Layers(pa.DataFrameModel):
    """One row a layer and a prompt: how far two models' hidden states are apart, as shares of their length.

    Layer 0 is what the first layer is given.
    """

    prompt: int = pa.Field(ge=0)
    layer: int = pa.Field(ge=0)
    relative: float = pa.Field(in_range={"min_value": 0, "max_value": 2.001}, nullable=True)
    relative_mean: float = pa.Field(in_range={"min_value": 0, "max_value": 2.001}, nullable=True)
    worst_position: int = pa.Field(ge=0)
    max_abs: float = pa.Field(ge=0, nullable=True)

    class Config:
        coerce = True
        unique = ("prompt", "layer")


class Gates(pa.DataFrameModel):
    """One row a measure of a gate: what was measured, what is allowed, and the verdict."""

    gate: str
    measure: str
    value: str
    allowed: str
    verdict: str = pa.Field(isin=["passed", "FAILED"])

    class Config:
        coerce = True
        unique = ("gate", "measure")


def checked(schema: type[pa.DataFrameModel], rows: list[dict[str, Any]], what: str) -> "DataFrame":
    """Return the rows as a frame that keeps to `schema`; ArtifactError names the first rows that do not."""
    frame = pd.DataFrame(rows, columns=None if rows else list(schema.to_schema().columns))
    try:
        return schema.validate(frame, lazy=True)
    except (SchemaErrors, SchemaError) as error:
        cases = error.failure_cases
        shown = cases.head(3).to_dict("records") if isinstance(cases, pd.DataFrame) else [cases]
        raise ArtifactError(
            f"{what} is not a table of {schema.__name__}: {json.dumps(shown, default=str)}"
        ) from error


def check_metrics(path: Path) -> dict[str, Any]:
    """Check the metrics file of a finished run and return its first and last loss."""
    rows = [record for record in read_metrics(path) if "loss" in record]
    table = checked(Metrics, rows, str(path))
    if table.empty:
        raise ArtifactError(f"{path} has no iterations")
    return {"first_loss": float(table["loss"].iloc[0]), "last_loss": float(table["loss"].iloc[-1])}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL table; pandas' own reader turns columns into dates by their names."""
    return [json.loads(line) for line in path.read_text().splitlines()]
