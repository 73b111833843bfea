from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.config import LoggerConfig
from training.metrics import read_metrics
from training.run_metrics import RunMetrics


def run(config, iterations, loss):
    metrics = RunMetrics()
    metrics.open(config, iterations[0] - 1)
    for iteration in iterations:
        metrics.write(iteration, {"loss": loss, "exported": "a folder"})
    metrics.close()


def test_a_resumed_run_takes_back_what_it_repeats_from_both(tmp_path):
    config = LoggerConfig(str(tmp_path / "metrics.jsonl"), tensorboard_dir=str(tmp_path / "curves"))
    run(config, [1, 2, 3, 4], 8.0)
    run(config, [3, 4], 2.0)
    lines = {line["iteration"]: line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")}
    events = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    curve = {event.step: event.value for event in events.Scalars("loss")}
    assert curve == lines == {1: 8.0, 2: 8.0, 3: 2.0, 4: 2.0}


def test_a_rank_that_opened_nothing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = RunMetrics()
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    assert not list(tmp_path.iterdir())
