"""Real runs on two ranks that go on from one another's checkpoints: layouts, experts, batches, exports."""

import json
import shutil
from pathlib import Path

import pytest
from process_groups import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bridge.exporter import export_checkpoint
from bridge.ledger import DIFFERENT, ONLY_A, ONLY_B, compare_ledgers, ledger
from tasks.metrics_follower import CURVES
from training.checkpoint_folders import complete_checkpoints
from training.metrics import read_metrics

EXPERTS = {
    "model.num_moe_experts": 4,
    "model.moe_ffn_hidden_size": 32,
    "model.moe_router_topk": 2,
    "checkpoint.pretrained_checkpoint": None,
    # half of what is saved must not be what an optimizer begins with
    "train.train_iters": 6,
    "train.eval_interval": None,
}
LAYOUTS = {
    "ep1": EXPERTS,
    "ep2": {**EXPERTS, "model.expert_model_parallel_size": 2, "checkpoint.async_save": True},
    "experts tp2": {
        **EXPERTS,
        # from 1234's weights one gradient becomes ten times the others, and rounding shows in it
        "rng.seed": 7,
        "model.tensor_model_parallel_size": 2,
        "model.sequence_parallel": True,
    },
    "experts tp2 ep2": {
        **EXPERTS,
        "model.tensor_model_parallel_size": 2,
        "model.sequence_parallel": True,
        "model.expert_model_parallel_size": 2,
        "model.expert_tensor_parallel_size": 1,
    },
    "experts cp2": {**EXPERTS, "model.context_parallel_size": 2},
    "experts pp2": {**EXPERTS, "model.pipeline_model_parallel_size": 2},
    "dp2": {"checkpoint.async_save": True, "mixed_precision.bf16": True},
    "pp2 vpp2": {
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 2,
        "mixed_precision.bf16": True,
    },
    "tp2": {"model.tensor_model_parallel_size": 2, "mixed_precision.bf16": True},
    "cp2": {"model.context_parallel_size": 2, "mixed_precision.bf16": True},
}
# "experts tp2" has expert tensor parallelism of two
WHOLE = ("ep1", "ep2", "experts tp2", "dp2", "cp2")
# from, to
RESUMED = (
    ("ep1", "ep2"),
    ("ep2", "ep1"),
    ("ep2", "experts tp2"),
    ("ep2", "experts pp2"),
    ("experts tp2", "experts tp2 ep2"),
    ("experts tp2", "experts cp2"),
    ("dp2", "tp2"),
    ("dp2", "cp2"),
    ("cp2", "pp2 vpp2"),
    ("dp2", "pp2 vpp2"),
    # the same layout: bit for bit
    ("ep2", "ep2"),
    ("dp2", "dp2"),
)
# bf16 sums in another order
TOLERANCE = {"ep1": 2e-5, "ep2": 2e-5, "experts tp2": 2e-5, "dp2": 2e-3, "cp2": 2e-3}
# samples of an iteration after the third, which had 8
BATCHES = (4, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(tiny_config, dataset, folder):
    """The report of one job that makes all runs."""

    def run(name, overrides, resume_from=None):
        config = tiny_config(**overrides, **{"checkpoint.save": str(folder / name)})
        config.logger.metrics_path = str(folder / f"{name}.jsonl")
        return {"config": config.to_dict(), "resume_from": resume_from and str(resume_from)}

    jobs = {name: run(name, LAYOUTS[name]) for name in WHOLE}
    for before, after in RESUMED:
        name = f"{before} to {after}"
        jobs[name] = run(name, LAYOUTS[after], folder / before / "iter_0000003")
    exporting = {"checkpoint.save_interval": 1, "checkpoint.most_recent_k": 1, "checkpoint.async_save": True}
    exporting |= {"checkpoint.export_interval": 2, "checkpoint.export_most_recent_k": 2}
    jobs["exporting"] = run(
        "exporting",
        {
            **exporting,
            "checkpoint.export_hf": str(folder / "exports"),
            "logger.tensorboard_dir": str(folder / "tensorboard"),
        },
        folder / "dp2/iter_0000003",
    )
    copied = shutil.copytree(dataset, folder / "dataset")
    # of a blend there are as many samples as are asked for; of one dataset, whole epochs
    blend = {"dataset.blend": [0.3, str(dataset), 0.7, str(copied)]}
    jobs["blend"] = run("blend", blend)
    for size in BATCHES:
        changes = {**blend, "train.global_batch_size": size}
        jobs[f"batch {size}"] = run(f"batch {size}", changes, folder / "blend/iter_0000003")
    jobs["no family"] = run(
        "no family",
        {**EXPERTS, "model.hf_model_type": "", "checkpoint.export_hf": str(folder / "no exports")},
    )
    report = run_ranks(2, "training_jobs.runs", {"runs": jobs, "evaluate": {}}, folder / "job")
    assert "error" not in report, report
    return report


def curve(folder, name, key):
    return {line["iteration"]: line[key] for line in read_metrics(folder / f"{name}.jsonl") if key in line}


@pytest.mark.parametrize(("before", "after"), RESUMED)
@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_checkpoint_goes_on_in_another_layout(runs, folder, before, after, key):
    found = curve(folder, f"{before} to {after}", key)
    expected = {iteration: value for iteration, value in curve(folder, before, key).items() if iteration > 3}
    assert list(found) == [4, 5, 6]
    if before == after:
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=TOLERANCE[before])


@pytest.mark.parametrize("size", BATCHES)
def test_another_batch_size_keeps_the_schedule(runs, folder, size):
    """The learning rate of an iteration is the same bit for bit, and there are samples for all of them."""
    rates, name = curve(folder, "blend", "learning_rate"), f"batch {size}"
    assert len(set(rates.values())) == 6
    assert curve(folder, name, "learning_rate") == {number: rates[number] for number in (4, 5, 6)}
    assert curve(folder, name, "consumed_samples") == {3 + number: 24 + number * size for number in (1, 2, 3)}


def test_tensorboard_shows_what_is_in_the_metrics_file(runs, folder):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    shown = {
        name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]
    }
    names = {name for line in read_metrics(folder / "exporting.jsonl") for name in line}
    assert set(shown) <= set(CURVES)  # which a release gives to MLflow
    assert set(shown) == names - {"iteration", "train_iters", "consumed_samples", "time", "exported"}
    assert {"loss", "validation_loss", "checkpoint_seconds", "checkpoint_written_seconds"} <= set(shown)
    for name, values in shown.items():
        assert values == pytest.approx(curve(folder, "exporting", name), rel=1e-6), name


@pytest.mark.parametrize("name", WHOLE)
def test_the_runs_learn(runs, folder, name):
    """Else a resumed run that forgot its optimizer could not be told from one that did not."""
    losses = curve(folder, name, "loss")
    assert losses[6] < losses[1] - 0.05


def test_exports_of_a_run_are_those_of_its_checkpoints(runs, folder):
    exports = complete_checkpoints(folder / "exports")
    assert [path.name for path in exports] == ["iter_0000004", "iter_0000006"]
    assert [path.name for path in complete_checkpoints(folder / "exporting")] == ["iter_0000006"]
    export_checkpoint(folder / "exporting", folder / "by hand")
    comparison = compare_ledgers(ledger(folder / "by hand"), ledger(exports[-1]))
    assert not [*comparison.names(ONLY_A), *comparison.names(ONLY_B), *comparison.names(DIFFERENT)]
    assert compare_ledgers(ledger(exports[0]), ledger(exports[1])).names(DIFFERENT)
    assert sorted(curve(folder, "exporting", "exported")) == [4, 6]
    assert not [path for path in (folder / "exports").iterdir() if path not in exports]


def test_an_export_that_fails_does_not_end_the_run(runs, folder):
    assert runs["runs"]["no family"]["iteration"] == 6
    errors = curve(folder, "no family", "export_error")
    assert list(errors) == [6]
    assert "model_type" in errors[6]
    assert complete_checkpoints(folder / "no exports") == []


def test_the_highest_of_all_ranks_is_known_to_the_first(runs):
    """On a GPU that is the peak of its memory."""
    assert runs["highest"] == 1.5


def test_sealing_is_in_the_metrics(runs, folder):
    written = curve(folder, "dp2", "checkpoint_written_seconds")
    assert list(written) == [3, 6]
    assert all(seconds > 0 for seconds in written.values())


def test_the_record_names_every_file(runs, folder):
    checkpoint = folder / "dp2" / "iter_0000006"
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(record["files"]) == files - {"checkpoint.json"}
    # every data-parallel rank wrote its part
    assert {name[:4] for name in files if name.endswith(".distcp")} == {"__0_", "__1_"}
