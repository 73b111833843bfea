"""The flow on a very small model: what it makes, what it does not do twice, how it fails and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import change_weight, copy_checkpoint
from mlflow import MlflowClient
from process_groups import TESTS
from small_release import seconds_of

from bridge.errors import GateError
from bridge.importer import import_checkpoint
from bridge.ledger import ledger
from flows.release_model import release_model
from tasks.artifact import Artifact
from tasks.chain import CHAIN
from tasks.plan import make_plan, store_of
from tasks.spec import ReleaseSpec, load_spec
from training.metrics import read_metrics


def artifact(spec: ReleaseSpec, step: str) -> Artifact:
    """Return what the plan would reuse: other tests release to other places from the same store."""
    found = {each.step: each.artifact for each in make_plan(spec, CHAIN, store_of(spec))}[step]
    assert found, f"{step} has no artifact"
    return found


def plan(spec: ReleaseSpec) -> dict[str, tuple[str, str]]:
    return {each.step: (each.action, each.reason) for each in make_plan(spec, CHAIN, store_of(spec))}


@pytest.fixture
def spec(small_release: Path) -> ReleaseSpec:
    return load_spec(small_release)


def test_loss_goes_down(spec) -> None:
    training = artifact(spec, "train").output
    assert training["last_loss"] < training["first_loss"] - 0.1
    losses = artifact(spec, "verify").output["gates"]["held_out_loss"]["metrics"]
    assert losses["loss_after"] < losses["loss_before"]


def test_artifacts_are_what_was_sealed(spec) -> None:
    for step in CHAIN:
        artifact(spec, step.name).verify()


def test_mlflow_has_a_child_for_each_step(spec) -> None:
    client = MlflowClient(f"sqlite:///{spec.workspace / 'mlflow.db'}")
    parent = artifact(spec, "publish").payload / "release.json"
    ids = json.loads(parent.read_text())["identifiers"]["mlflow"]
    query = f"tags.`mlflow.parentRunId` = '{ids['run_id']}'"
    children = {run.data.tags["step"]: run for run in client.search_runs([ids["experiment_id"]], query)}
    assert set(children) == {step.name for step in CHAIN}
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    train = children["train"]
    points = client.get_metric_history(train.info.run_id, "loss")
    assert sorted(point.step for point in points) == list(range(1, 7))
    assert train.data.params["optimizer.lr"] == "0.01"
    assert {entry.dataset.name for entry in train.inputs.dataset_inputs} == {
        "fetch",
        "import",
        "build_dataset",
    }
    assert artifact(spec, "train").provenance["mlflow_run_id"] == train.info.run_id


def test_flow_reuses_everything_quickly(spec, small_release, prefect_server) -> None:
    started = time.monotonic()
    again = release_model(spec)
    assert time.monotonic() - started < seconds_of(small_release) / 5
    assert {row["action"] for row in again["steps"]} == {"reuse"}


def test_removed_release_is_published_again(spec) -> None:
    release = Path(artifact(spec, "publish").output["address"])
    aside = release.rename(release.with_name("aside"))
    try:
        found = plan(spec)
    finally:
        aside.rename(release)
    assert found["publish"] == ("run", f"no release at {release} any more")
    assert {action for name, (action, _) in found.items() if name != "publish"} == {"reuse"}


def test_failing_gate_publishes_nothing_and_keeps_its_report(spec, prefect_server, tmp_path) -> None:
    changed = spec.model_copy(update={"check": spec.check.model_copy(update={"seed": 7})})
    releases = sorted((spec.workspace / "releases").iterdir())
    imported = artifact(spec, "import").payload
    other = copy_checkpoint(artifact(spec, "fetch").payload, tmp_path / "other")
    change_weight(other, "model.layers.0.mlp.up_proj.weight")
    (shard,) = (imported / file for file in {record.file for record in ledger(imported).records})
    content = shard.read_bytes()
    shard.write_bytes((import_checkpoint(other, tmp_path / "changed").path / shard.name).read_bytes())
    try:
        with pytest.raises(GateError, match="check_import failed: digests: 1 tensors different") as error:
            release_model(changed)
    finally:
        shard.write_bytes(content)
    report = Path(str(error.value).rpartition("(report: ")[2].removesuffix(")"))
    assert json.loads(report.read_text())["passed"] is False
    assert sorted((spec.workspace / "releases").iterdir()) == releases
    assert plan(changed)["check_import"] == ("run", "config changed: seed 1234 -> 7")


def test_killed_training_goes_on_and_loses_nothing(small_release, tmp_path) -> None:
    changes = [
        "train.overrides.train.train_iters=20",
        "train.overrides.checkpoint.save_interval=10",
        "train.parallel.tensor_model_parallel_size=2",
    ]
    spec = load_spec(small_release, changes)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, str(Path(__file__).with_name("train_only.py")), str(tmp_path / "spec.json")]
    partial = store_of(spec).root / "train"
    # the tree before the tests, whose folder bridge would hide the package
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    process = subprocess.Popen([*command, "iter_0000020"], env=environment)
    wait_for_writers(partial, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert plan(spec)["train"][1].endswith("goes on from where a run was stopped")
    subprocess.run(command, check=True)
    assert plan(spec)["train"][0] == "reuse"
    assert list(partial.glob("*.partial")) == []
    metrics = artifact(spec, "train").path / "metrics.jsonl"
    assert "resumed_at" in metrics.read_text()
    assert [record["iteration"] for record in read_metrics(metrics) if "loss" in record] == list(range(1, 21))


def wait_for_writers(folder: Path, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 240
    while len(list(folder.glob("*.partial/checkpoints/iter_0000020.*.partial/*.distcp"))) < 2:
        assert time.monotonic() < deadline, "no checkpoint"
        assert process.poll() is None, "training ended before it was killed"
        time.sleep(0.02)


def test_parameters_make_a_typed_form() -> None:
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(release_model).model_dump()
    sections = schema["definitions"]
    assert set(schema["properties"]) == {"spec"}
    assert sections["CheckSpec"]["properties"]["num_prompts"]["maximum"] == 1024
    assert sections["DType"]["enum"] == ["float32", "bfloat16"]
    assert "Megatron" in sections["CheckSpec"]["description"]
