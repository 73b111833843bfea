"""`bridgeworks release` from the shell: the table, the second run, the plan after a change, the audit."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from checkpoints import make_hf_checkpoint
from mlflow import MlflowClient
from small_release import OVERRIDES, SECRETS, run, seconds_of, write_spec

from flows.show_release import show_result
from tasks.chain import CHAIN

STEPS = [step.name for step in CHAIN]


def release_of(spec: Path) -> Path:
    (release,) = spec.parent.glob("releases/*")
    return release


def test_the_output_ends_with_a_table_and_two_lines(small_release: Path) -> None:
    lines = small_release.with_name("output.txt").read_text().splitlines()
    rows = {line.split()[0]: line.split() for line in lines[-len(STEPS) - 5 :] if line.split()[:1]}
    assert [name for name in rows if name in STEPS] == STEPS
    for name in STEPS:
        _, seconds, _, verdict, artifact = rows[name]
        assert float(seconds) >= 0
        assert verdict == ("passed" if name in ("check_import", "verify") else "done")
        assert (small_release.parent / artifact).is_dir() or Path(artifact).is_dir()
    assert re.search(r"PREFECT_HOME=\S+ \S+prefect server start .*/runs/flow-run/[0-9a-f-]{36}$", lines[-2])
    assert re.search(
        r"mlflow server --backend-store-uri sqlite:\S+ .*/#/experiments/\d+/runs/[0-9a-f]{32}$", lines[-1]
    )


def test_a_second_run_does_no_work_and_says_so(small_release: Path) -> None:
    started = time.monotonic()
    again = run("release", small_release)
    assert time.monotonic() - started < seconds_of(small_release) / 5
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("reused") == len(STEPS)
    first = small_release.with_name("output.txt").read_text().splitlines()
    assert again.stdout.splitlines()[-1] == first[-1]


def test_a_second_run_for_scripts(small_release: Path) -> None:
    result = json.loads(run("release", small_release, "--json").stdout)
    assert [step["action"] for step in result["steps"]] == ["reuse"] * len(STEPS)
    assert Path(result["release"]["address"]) == release_of(small_release)


def test_a_change_of_the_recipe_runs_again_from_training_on(small_release: Path) -> None:
    change = "train.overrides.optimizer.lr=0.02"
    plan = json.loads(run("plan", small_release, "--set", change, "--json").stdout)
    actions = {step["step"]: step for step in plan}
    assert [name for name in STEPS if actions[name]["action"] == "run"] == STEPS[STEPS.index("train") :]
    assert "optimizer.lr 0.01 -> 0.02" in actions["train"]["reason"]


def test_a_taken_destination_is_refused_before_any_work(small_release: Path) -> None:
    changes = (
        "--set",
        f"publish.destination={release_of(small_release)}",
        "--set",
        "train.overrides.rng.seed=1",
    )
    refused = run("release", small_release, *changes)
    assert refused.returncode == 2
    assert "never overwritten" in refused.stderr


def test_audit(small_release: Path) -> None:
    release = release_of(small_release)
    verified = run("audit", "verify", release)
    assert verified.returncode == 0, verified.stdout
    shown = run("audit", "show", release).stdout
    assert "verify.logits" in shown
    assert run("audit", "diff", release, release).stdout.startswith("no difference")


def test_a_release_in_a_bucket_is_shown_by_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    release = {"address": "s3://models/small", "model": "small", "version": "1"}
    show_result({"name": "small", "steps": [], "release": release, "problems": [], "identifiers": {}})
    assert "Release: s3://models/small (model small, version 1 in MLflow)" in capsys.readouterr().out


def test_the_release_is_registered_by_reference(small_release: Path) -> None:
    client = MlflowClient(f"sqlite:///{small_release.parent / 'mlflow.db'}")
    version = client.get_model_version_by_alias("small", "released")
    release = json.loads((release_of(small_release) / "release.json").read_text())
    assert version.tags["uri"] == str(release_of(small_release))
    assert version.tags["digest"] == release["digest"]
    run_id = release["identifiers"]["mlflow"]["run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert version.run_id == run_id


def test_no_secret_is_written_anywhere(small_release: Path) -> None:
    for path in small_release.parent.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


@pytest.mark.slow
def test_train_export_and_compare_by_hand(small_release: Path, tmp_path: Path) -> None:
    (imported,) = small_release.parent.glob("store/import/*/checkpoint")
    (dataset,) = small_release.parent.glob("store/build_dataset/*/dataset")
    changes = [f"--set={name}={value}" for name, value in OVERRIDES.items()]
    arguments = ("--load", imported, "--dataset", dataset, "--output", tmp_path / "run", "--tp", 2, "--json")
    trained = run("train", "continued_pretrain_config", *arguments, *changes)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads(trained.stdout)
    assert summary["iteration"] == OVERRIDES["train.train_iters"]
    exported = run("export", summary["checkpoints"], tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr
    compared = run("compare", tmp_path / "hf", summary["checkpoints"], "--pp", 2)
    assert compared.returncode == 0, compared.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_release_of_experts_that_every_job_spreads(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    source = make_hf_checkpoint(tmp_path / "experts", "qwen3_moe", vocab_size=280, num_hidden_layers=2)
    for file in tmp_path.glob("source/tokenizer*"):
        shutil.copy(file, source)
    changes = (
        "source.uri=" + str(source),
        "train.overrides.model.sequence_parallel=true",
        "train.parallel.tensor_model_parallel_size=2",
        "train.parallel.expert_model_parallel_size=2",
        "train.parallel.expert_tensor_parallel_size=1",
        "check.expert_model_parallel_size=2",
    )
    options = [text for change in changes for text in ("--set", change)]
    made = run("release", spec, *options, PREFECT_HOME=str(tmp_path / "prefect"), CUDA_VISIBLE_DEVICES="")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "2: tensor 2, expert 2" in made.stdout
    config = json.loads((release_of(spec) / "release.json").read_text())["training_config"]
    assert (config["num_processes"], config["data_parallel_size"]) == (2, 1)
    assert config["model"]["expert_model_parallel_size"] == 2
    assert "| model.expert_tensor_parallel_size | 1 |" in (release_of(spec) / "README.md").read_text()
