"""Losses and gradients that really are no numbers, on one rank of two: nothing of the model changes."""

import pytest
from process_groups import run_ranks

from bridge.errors import DivergenceError
from bridge.job import failure
from training.checkpoint_folders import complete_checkpoints
from training.config import ResilienceConfig
from training.faults import NAN, SPIKE, Faults
from training.metrics import read_metrics

LAYOUTS = {
    "tp2 sequence parallel": {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
    "pp2 vpp2": {
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 2,
    },
    "dp2": {},
    "dp2 overlapped": {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True},
    "dp2 bf16": {"mixed_precision.bf16": True},
}
# calls of the forward step in one iteration: micro-batches, for each of the model's chunks
CALLS = {"tp2 sequence parallel": 4, "pp2 vpp2": 8}
STEPS = [(layout, kind) for layout in LAYOUTS for kind in ("loss", "gradient")]
SKIP = {"resilience.on_nan": "skip"}
WATCHED = {"resilience.spike_warmup_iters": 2, "resilience.spike_factor": 3.0}
RUNS = {
    "skipped": ("loss", [5], SKIP),
    "stopped": ("loss", [7], {}),
    "stopped by a gradient": ("gradient", [7], {}),
    "too many": ("loss", range(4, 40), {**SKIP, "resilience.max_skipped": 2}),
    "spike skipped": ("spike", [8, 9], {**WATCHED, "resilience.on_spike": "skip"}),
    "spike ignored": ("spike", [8, 9], WATCHED),
    "spike stopped": ("spike", [8, 9], {**WATCHED, "resilience.on_spike": "stop"}),
    "begun": ("loss", [5], {**WATCHED, **SKIP, "train.train_iters": 4}),
    # a spike in its first iteration, which it can tell from the losses before only
    "resumed": ("spike", [0, 1], {**WATCHED, "resilience.on_spike": "skip"}),
}
PLACES = {"resumed": "begun"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def found(tiny_config, folder):
    """What one job of two ranks found; two micro-batches make an iteration of each rank in `RUNS`."""

    def job(kind, microbatches, overrides):
        settings = {"train.eval_interval": None, "checkpoint.save_interval": 2, **overrides}
        return {"config": tiny_config(**settings).to_dict(), "spoil": [kind, list(microbatches), 1]}

    def third(layout):
        calls = CALLS.get(layout, 2)
        return range(2 * calls, 3 * calls)

    steps = {
        f"{layout} {kind}": job(kind, third(layout), {**LAYOUTS[layout], **SKIP}) for layout, kind in STEPS
    }
    runs = {}
    for name, (kind, microbatches, overrides) in RUNS.items():
        save = str(folder / PLACES.get(name, name))
        places = {"checkpoint.save": save, "logger.metrics_path": str(metrics(folder, name))}
        runs[name] = job(kind, microbatches, {**overrides, **places})
    for job_config in steps.values():
        job_config["config"]["dataset"]["path_to_cache"] = str(folder / "indices")
    report = run_ranks(2, "training_jobs.fault_runs", {"steps": steps, "runs": runs}, folder / "job")
    assert "error" not in report, report
    return report


def metrics(folder, name):
    return folder / f"{name}.jsonl"


@pytest.mark.parametrize(("layout", "kind"), STEPS)
def test_a_skipped_iteration_changes_no_bit(found, layout, kind):
    result = found["steps"][f"{layout} {kind}"]
    assert result["skipped"] == [False, False, True, False]
    assert result["changed"] == [[True, True, False, True]] * 2
    assert result["rates"] == [8, 16, 16, 24]
    assert (result["iteration"], result["consumed_samples"]) == (4, 32)


def test_a_skip_is_in_the_metrics_and_the_report(found, folder):
    report, lines = found["runs"]["skipped"], read_metrics(metrics(folder, "skipped"))
    assert report["skipped_iterations"] == 1
    assert (report["iteration"], report["consumed_samples"]) == (6, 48)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert (lines[2][NAN], lines[2]["skipped"]) == (1, 1)
    assert "loss" not in lines[2]
    assert all("skipped" not in line for line in lines if line["iteration"] != 3)
    assert report["loss"] == lines[-1]["loss"]


def test_a_stop_names_iteration_rank_and_samples(found, folder):
    error = found["runs"]["stopped"]["error"]
    # call 7 of rank 1 is its second micro-batch of iteration 4
    assert "iteration 4: the loss is nan from rank 1, in micro-batches with samples 30-31" in error
    assert "its samples are 24 to 31 of the run" in error
    assert [path.name for path in complete_checkpoints(folder / "stopped")] == ["iter_0000002"]
    assert (folder / "stopped" / "latest_checkpointed_iteration.txt").read_text() == "2\n"


def test_a_stop_names_gradients(found):
    error = found["runs"]["stopped by a gradient"]["error"]
    assert "iteration 4: the gradient norm is nan from gradients, most on rank 1: " in error
    assert "embedding.word_embeddings.weight, decoder.layers.0." in error


def test_too_many_in_a_row_stop_the_run(found, folder):
    error = found["runs"]["too many"]["error"]
    assert error.startswith("iteration 5: the loss is nan")
    assert "number 3 in a row" in error
    assert [path.name for path in complete_checkpoints(folder / "too many")] == [
        "iter_0000002",
        "iter_0000004",
    ]


def test_a_spike_is_skipped_ignored_or_ends_the_run(found, folder):
    skipped, ignored = found["runs"]["spike skipped"], found["runs"]["spike ignored"]
    assert (skipped["skipped_iterations"], skipped["spikes"]) == (1, 1)
    assert (ignored["skipped_iterations"], ignored["spikes"]) == (0, 1)
    line = read_metrics(metrics(folder, "spike skipped"))[4]
    assert (line["iteration"], line[SPIKE], line["skipped"]) == (5, 1, 1)
    assert line["loss"] > 30
    assert "iteration 5: the loss is" in found["runs"]["spike stopped"]["error"]
    assert "times the recent median" in found["runs"]["spike stopped"]["error"]


def test_a_resumed_run_knows_what_was_before(found, folder):
    assert found["runs"]["begun"]["skipped_iterations"] == 1
    resumed = found["runs"]["resumed"]
    assert (resumed["skipped_iterations"], resumed["spikes"], resumed["iteration"]) == (2, 1, 6)
    assert read_metrics(metrics(folder, "resumed"))[0][SPIKE] == 1


def test_a_divergence_is_a_verdict():
    assert failure(DivergenceError("no"), 1)["error"]["verdict"]


def judged(faults, losses):
    return [fault and fault.kind for fault in (faults.judge(loss, 1.0) for loss in losses)]


def test_spikes_wait_for_the_warm_up_and_do_not_move_the_median():
    config = ResilienceConfig(on_spike="skip", spike_factor=2, spike_window=3, spike_warmup_iters=3)
    assert judged(Faults(config), [50, 2, 2, 9, 9, 9, 2]) == [None, None, None, SPIKE, SPIKE, SPIKE, None]


def test_a_rise_that_is_ignored_becomes_the_new_level():
    config = ResilienceConfig(on_spike="ignore", spike_factor=2, spike_window=3, spike_warmup_iters=3)
    faults = Faults(config)
    assert judged(faults, [2, 2, 2, 9, 9, 9, 9]) == [None, None, None, SPIKE, SPIKE, None, None]
    assert (faults.spikes, faults.skipped) == (2, 0)


def test_a_slow_rise_is_no_spike():
    config = ResilienceConfig(spike_factor=2, spike_window=3, spike_warmup_iters=3)
    assert judged(Faults(config), [2, 2, 2, 3, 4, 5, 6, 7]) == [None] * 8


def test_skips_in_a_row_are_counted_anew_after_a_good_iteration():
    faults = Faults(ResilienceConfig(on_nan="skip", max_skipped=1))
    assert judged(faults, [1, float("nan"), 1, float("inf"), float("nan")]) == [None, NAN, None, NAN, NAN]
    assert faults.too_many
    assert faults.skipped == 3


def test_state_goes_on():
    config = ResilienceConfig(on_nan="skip", spike_factor=2, spike_window=3, spike_warmup_iters=3)
    first, second = Faults(config), Faults(config)
    judged(first, [2, 3, 4, float("nan")])
    second.load_state_dict(first.state_dict())
    assert judged(second, [7]) == judged(first, [7]) == [SPIKE]
    assert second.state_dict() == first.state_dict()
