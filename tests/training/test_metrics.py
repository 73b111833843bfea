from training.metrics import append_metrics, close_torn_line, read_metrics


def test_validation_belongs_to_its_iteration(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    append_metrics(path, {"iteration": 1, "loss": 3.0})
    append_metrics(path, {"iteration": 2, "loss": 2.0})
    append_metrics(path, {"iteration": 2, "validation_loss": 2.5})
    first, second = read_metrics(path)
    assert (first["iteration"], first["loss"]) == (1, 3.0)
    assert (second["loss"], second["validation_loss"]) == (2.0, 2.5)
    assert second["time"] > 0


def test_resumed_run_takes_back_what_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for iteration in (1, 2, 3):
        append_metrics(path, {"iteration": iteration, "loss": 1.0, "validation_loss": 9.0})
    append_metrics(path, {"resumed_at": 1})
    append_metrics(path, {"iteration": 2, "loss": 5.0})
    records = read_metrics(path)
    assert [(record["iteration"], record["loss"]) for record in records] == [(1, 1.0), (2, 5.0)]
    assert "validation_loss" not in records[1]


def test_torn_line_is_no_record_and_harms_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"iteration": 1, "loss": 1.0})
    with path.open("a") as file:
        file.write('{"iteration": 2, "lo')
    assert [record["iteration"] for record in read_metrics(path)] == [1]
    close_torn_line(path)
    append_metrics(path, {"iteration": 2, "loss": 2.0})
    assert [record["iteration"] for record in read_metrics(path)] == [1, 2]


def test_no_file_is_no_records(tmp_path):
    close_torn_line(tmp_path / "none")
    assert read_metrics(tmp_path / "none") == []
