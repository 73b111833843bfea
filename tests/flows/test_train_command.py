"""`bridgeworks train` from the shell: real runs in every kind of layout, and what is refused before one."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from checkpoints import make_hf_checkpoint
from small_release import PROGRAM, run

from bridge.errors import CheckpointError, InputError
from bridge.folder_lock import locked
from bridge.job import EXIT_STOPPED
from flows.train import make_config, parallel_of, weights_of
from recipes.llama import llama32_1b_pretrain_config
from tasks.spec import ParallelSpec
from tasks.train import config_for
from training.checkpoint_folders import latest_complete
from training.metrics import read_metrics

SETTINGS = {
    "dataset.mock": "true",
    "train.train_iters": 2,
    "train.global_batch_size": 4,
    "train.eval_interval": "null",
    "scheduler.lr_warmup_iters": 0,
    "model.seq_length": 16,
    "mixed_precision": "fp32",
}
SETTINGS_OF_ALL = [text for name, value in SETTINGS.items() for text in ("--set", f"{name}={value}")]
SIZES = ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor", "data")
ASK = dict.fromkeys(f"{size}_parallel_size" for size in SIZES)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "hf"
    return make_hf_checkpoint(folder, "qwen3_moe", num_hidden_layers=2)


def train(load: Path, output: Path, *options: object, **variables: str) -> subprocess.CompletedProcess[str]:
    # no GPU, so that the test is the same everywhere
    variables = {"CUDA_VISIBLE_DEVICES": "", **variables}
    arguments = ("continued_pretrain_config", "--load", load, "--output", output, *SETTINGS_OF_ALL, *options)
    return run("train", *arguments, **variables)


def check_trained(result: subprocess.CompletedProcess[str], output: Path, **sizes: int) -> list[float]:
    """Hold report, record and metrics of a run against what was asked for; return its losses."""
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["stop_reason"] == "all iterations done"
    assert {name: report["parallel"][f"{name}_parallel_size"] for name in sizes} == sizes
    model = json.loads((output / "checkpoints/iter_0000002/run_config.json").read_text())["model"]
    recorded = {name: size for name, size in sizes.items() if name != "data"}
    assert {name: model[f"{name}_parallel_size"] for name in recorded} == recorded
    writers = {file.name.split("_")[2] for file in (output / "checkpoints/iter_0000002").glob("*.distcp")}
    assert len(writers) == report["parallel"]["num_processes"]
    return [record["loss"] for record in read_metrics(output / "metrics.jsonl") if "loss" in record]


def test_each_sequence_and_the_experts_on_two_ranks(experts: Path, tmp_path: Path) -> None:
    """Experts are shared by the ranks that --cp makes, without any more."""
    result = train(experts, tmp_path / "run", "--cp", 2, "--ep", 2, "--json")
    losses = check_trained(result, tmp_path / "run", context=2, expert_model=2, data=1)
    assert len(losses) == 2


def test_a_run_that_is_told_to_stop_saves_and_says_how_to_go_on(experts: Path, tmp_path: Path) -> None:
    """SIGTERM comes twice, as from `timeout`; relative paths are not those of the job's folder."""
    changes = (*SETTINGS_OF_ALL, "--set", "train.train_iters=5000", "--set", "logger.tensorboard_dir=tb")
    command = ["train", "continued_pretrain_config", "--load", experts, "--output", "run", *changes]
    process = subprocess.Popen(
        [PROGRAM, *map(str, command), "--dp", "2", "--grace", "120"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.is_file() and len(read_metrics(metrics)) > 1):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, said
    last = latest_complete(tmp_path / "run/checkpoints")
    assert last > 1
    assert "SIGTERM: the job ends its iteration and saves, for which it has 120 seconds" in said
    assert (
        f"stopped: told to stop by SIGTERM: iteration {last} is saved in {tmp_path}/run/checkpoints" in said
    )
    (attempt,) = json.loads((tmp_path / "run/attempts.json").read_text())
    assert (attempt["outcome"], attempt["to_iteration"]) == ("ended", last)
    assert attempt["reason"].startswith(f"JobSavedError: told to stop by SIGTERM: iteration {last} is saved")
    assert list((tmp_path / "tb").iterdir())


@pytest.mark.slow
def test_layouts_of_experts_train_alike(experts: Path, tmp_path: Path) -> None:
    alone = train(experts, tmp_path / "alone", "--json")
    losses = check_trained(alone, tmp_path / "alone", expert_model=1, data=1)
    spread = train(experts, tmp_path / "ep", "--ep", 2, "--dp", 2, "--json")
    assert check_trained(spread, tmp_path / "ep", expert_model=2, data=2) == pytest.approx(losses, rel=2e-5)
    options = ("--tp", 2, "--ep", 2, "--etp", 1, "--set", "model.sequence_parallel=true", "--json")
    mixed = train(experts, tmp_path / "etp", *options)
    sizes = {"tensor_model": 2, "expert_model": 2, "expert_tensor": 1, "data": 1}
    assert check_trained(mixed, tmp_path / "etp", **sizes) == pytest.approx(losses, rel=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ep", 2), "1 ranks cannot hold experts spread over 2: expert_model_parallel_size 2 x"),
        (("--ep", 3, "--dp", 3), "num_moe_experts 8 is not divisible by expert_model_parallel_size 3"),
        (("--etp", 2, "--dp", 2), "expert_tensor_parallel_size 2 with expert_model_parallel_size 1"),
        (("--tp", 2), "set model.sequence_parallel to true"),
        (("--tp", 3), "model.num_attention_heads 8 is not divisible by tensor_model_parallel_size 3"),
        (("--pp", 3), "model.num_layers 2 is not divisible by the 3 pipeline stages"),
        (("--cp", 3), "model.seq_length 16 cannot be shared out with context_parallel_size 3"),
        (("--dp", 3), "train.global_batch_size 4 is not divisible by micro_batch_size x data_parallel_size"),
        (("--cp", 65), "--cp"),
        (("--set", "model.num_layers=4"), "model.num_layers is 4, and 2 in the checkpoint that the weights"),
        (("--set", "model.context_parallel_size=2"), "give parallel sizes by --tp, --pp, --cp, --ep"),
        (("--set", "model.expert_tensor_parallel_size=2"), "give parallel sizes by --tp, --pp, --cp, --ep"),
        (("--set", "mixed_precision=fp16_mixed"), "mixed_precision asks for fp16, which needs a GPU"),
    ],
)
def test_contradictions_are_refused_before_any_process_starts(
    experts: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = train(experts, tmp_path / "run", *options)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("checkpoint.save=there", "checkpoint.save=there: give the run's folder by --output"),
        ("checkpoint.pretrained_checkpoint=/none", "give the checkpoint to start from by --load"),
        ("logger.metrics_path=m.jsonl", "the metrics are in the folder that --output gives"),
    ],
)
def test_settings_that_options_decide(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config("llama32_1b_pretrain_config", None, ParallelSpec(), [setting])


@pytest.mark.parametrize("options", [(), ("--set", "logger.tensorboard_dir=file/curves")])
def test_places_that_cannot_be_written_are_one_line(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    result = train(experts, tmp_path / "run" if options else tmp_path / "file/run", *options)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"{tmp_path}/file" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_launcher_in_a_folder_touches_nothing(experts: Path, tmp_path: Path) -> None:
    """Each keeps its own list of attempts, and would write over the other's."""
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        result = train(experts, tmp_path / "run")
    assert result.returncode == 2
    assert f"{tmp_path}/run is the folder of a run that is at work" in result.stderr
    assert not list((tmp_path / "run").iterdir())


def test_text_that_is_named_twice(experts: Path, tmp_path: Path) -> None:
    twice = ("--dataset", tmp_path / "a", "--set", f'dataset.blend=["{tmp_path}/b"]')
    result = train(experts, tmp_path / "run", *twice)
    assert result.returncode == 2
    assert "--dataset and dataset.blend both name the text" in result.stderr


def test_more_ranks_than_this_machine_has_gpus(experts: Path, tmp_path: Path) -> None:
    fake = tmp_path / "bin/nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho '9.0, GPU-a'\n")
    fake.chmod(0o755)
    result = train(experts, tmp_path / "run", "--dp", 2, PATH=str(fake.parent), CUDA_VISIBLE_DEVICES="0")
    assert result.returncode == 2
    assert (
        "--ep, --etp and --dp make 2 ranks, each with a GPU of its own, and this machine has 1"
        in result.stderr
    )


def test_experts_of_a_model_that_has_none(tmp_path: Path) -> None:
    dense = make_hf_checkpoint(tmp_path / "hf", "llama", num_hidden_layers=2)
    result = train(dense, tmp_path / "run", "--ep", 2, "--dp", 2)
    assert result.returncode == 2
    assert "model.expert_model_parallel_size is 2 in a model without experts" in result.stderr


def test_a_recipe_without_a_model_asks_for_one(tmp_path: Path) -> None:
    result = run("train", "continued_pretrain_config", "--output", tmp_path / "run")
    assert result.returncode == 2
    assert "name its folder with --load" in result.stderr


def test_the_folder_of_a_run_is_answered_by_that_of_its_checkpoints(tmp_path: Path) -> None:
    latest = tmp_path / "old/checkpoints/latest_checkpointed_iteration.txt"
    latest.parent.mkdir(parents=True)
    latest.write_text("3")
    with pytest.raises(CheckpointError, match=rf"a run's folder: give .*, {latest.parent}$"):
        weights_of(tmp_path / "old")


def test_a_name_on_the_hub_is_no_folder(tmp_path: Path) -> None:
    result = train(Path("meta-llama/Llama-3.2-1B"), tmp_path / "run")
    assert result.returncode == 2
    assert "`bridgeworks import hf://organisation/name Llama-3.2-1B`" in result.stderr


def test_sizes_that_nobody_gives_are_the_recipes() -> None:
    sizes = parallel_of(
        "qwen3_30b_a3b_pretrain_config", {**ASK, "context_parallel_size": 2, "data_parallel_size": 1}
    )
    assert sizes.num_processes == 4 * 2 * 2
    assert (sizes.expert_model_parallel_size, sizes.expert_tensor_parallel_size) == (4, 1)
    assert parallel_of("continued_pretrain_config", {**ASK, "data_parallel_size": 3}).num_processes == 3


def test_a_run_takes_from_a_checkpoint_what_the_model_is_and_not_how_another_run_was_made() -> None:
    parallel = ParallelSpec(context_parallel_size=2)
    trained = llama32_1b_pretrain_config(
        pipeline_model_parallel_size=4,
        num_layers_in_first_pipeline_stage=1,
        virtual_pipeline_model_parallel_size=5,
        recompute_granularity="selective",
        recompute_modules=["mlp"],
        cpu_offloading_num_layers=3,
        apply_rope_fusion=False,
    ).model
    config = config_for("continued_pretrain_config", parallel, trained)
    expected = llama32_1b_pretrain_config(seq_length=4096, context_parallel_size=2).model
    assert config.model == expected
