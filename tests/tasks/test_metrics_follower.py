"""Following a metrics file that grows, is torn and is taken back."""

from pathlib import Path

import pytest

from tasks.lineage import StepRun
from tasks.metrics_follower import MetricsFollower
from tasks.step import RunRecord, StepContext
from training.metrics import append_metrics


class Recorder(StepRun):
    def __init__(self) -> None:
        self.points = []

    def log_metrics(self, metrics) -> None:
        self.points += [(point.name, point.step, point.value) for point in metrics]


@pytest.fixture
def context(tmp_path) -> StepContext:
    return StepContext(RunRecord("tiny", tmp_path), tmp_path, run=Recorder())


def line(iteration: int, loss: float) -> dict:
    return {"iteration": iteration, "loss": loss}


def test_every_point_once_while_the_file_grows(tmp_path, context) -> None:
    path = Path(tmp_path, "metrics.jsonl")
    follower = MetricsFollower(path, 3, context)
    follower.deliver()  # no file yet
    for number in (1, 2, 3):
        append_metrics(path, line(number, 1 / number))
        with path.open("a") as file:
            file.write('{"iteration": 4, "lo')  # a line that is being written
        follower.deliver()
        path.write_text(path.read_text().removesuffix('{"iteration": 4, "lo'))
    append_metrics(path, {"iteration": 2, "validation_loss": 0.7})
    follower.deliver()
    assert context.run.points == [
        *(("loss", number, 1 / number) for number in (1, 2, 3)),
        ("validation_loss", 2, 0.7),
    ]


def test_a_new_attempt_gets_the_whole_curve(tmp_path, context) -> None:
    path = Path(tmp_path, "metrics.jsonl")
    for number in (1, 2, 3):
        append_metrics(path, line(number, 9.0))
    append_metrics(path, {"resumed_at": 1})
    append_metrics(path, line(2, 2.0))
    MetricsFollower(path, 3, context).deliver()
    assert context.run.points == [("loss", 1, 9.0), ("loss", 2, 2.0)]


def test_progress_is_told(tmp_path, context, monkeypatch) -> None:
    told = []
    context.progress = lambda *args: told.append(args)
    path = Path(tmp_path, "metrics.jsonl")
    append_metrics(path, line(1, 2.5))
    MetricsFollower(path, 4, context).tick()
    assert told == [(1, 4, "iteration 1 of 4, loss 2.5000")]
