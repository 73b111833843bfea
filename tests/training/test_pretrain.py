"""Real runs on two ranks agree with one; they go on in other layouts, exactly after SIGTERM and kill -9."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import make_hf_checkpoint
from process_groups import TESTS, run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge.errors import ConfigError
from bridge.exporter import export_checkpoint
from bridge.importer import import_checkpoint
from bridge.ledger import DIFFERENT, ONLY_A, ONLY_B, compare_ledgers, ledger
from bridge.megatron_checkpoint import read_model
from training.checkpoint_folders import complete_checkpoints
from training.metrics import read_metrics
from training.overrides import apply_overrides
from training.pretrain import EXIT_STOPPED, take_places

LAYOUTS = {
    "tp2": {"model.tensor_model_parallel_size": 2},
    "tp2 sequence parallel": {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
    "pp2": {"model.pipeline_model_parallel_size": 2},
    "pp2 vpp2": {
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 2,
    },
    "pp2 vpp2 overlapped": {
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 2,
        "ddp.overlap_grad_reduce": True,
        "ddp.overlap_param_gather": True,
    },
    "cp2": {"model.context_parallel_size": 2},
    "dp2": {},
    "dp2 overlapped": {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True},
    "dp2 recomputed": {
        "model.recompute_granularity": "full",
        "model.recompute_method": "uniform",
        "model.recompute_num_layers": 1,
    },
    "pp2 uneven": {
        "model.pipeline_model_parallel_size": 2,
        "model.num_layers_in_first_pipeline_stage": 1,
    },
    "pp2 layout": {
        "model.pipeline_model_parallel_size": 2,
        "model.pipeline_model_parallel_layout": "Ettt|tL",
    },
}
EP2 = {"model.expert_model_parallel_size": 2}
TP2 = LAYOUTS["tp2 sequence parallel"]
EXPERT_LAYOUTS = {
    "experts dp2": {},
    "experts ep2": EP2,
    "experts tp2 sequence parallel": TP2,
    "experts tp2 sequence parallel ep2": {**TP2, **EP2, "model.expert_tensor_parallel_size": 1},
    "experts pp2": LAYOUTS["pp2"],
}
# of float32 sums in another order; each iteration adds to the difference
AGREEMENT = 2e-5
RESHARDED = ("pp2", "dp2", "tp2 sequence parallel")
# 16-bit weights and dropout: nothing of the state may be lost unnoticed
EXACT = {
    "train.train_iters": 30,
    "train.eval_interval": 10,
    "checkpoint.save_interval": 8,
    "model.tensor_model_parallel_size": 2,
    "model.hidden_dropout": 0.1,
    "model.attention_dropout": 0.1,
    "mixed_precision.bf16": True,
}

LONGEST = 240  # seconds, to end a hang
ENVIRONMENT = {
    # the tree before the tests, whose folder bridge would hide the package
    "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    # torchrun would kill ranks that have not saved within half a minute
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(LONGEST),
}

EVALUATION = {"seq_length": 32, "num_batches": 15}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def experts(folder) -> Path:
    """A Megatron checkpoint with experts, for the vocabulary of the dataset."""
    source = make_hf_checkpoint(folder / "experts-hf", "qwen3_moe", dtype="float32", vocab_size=300)
    import_checkpoint(source, folder / "experts")
    return folder / "experts"


@pytest.fixture(scope="module")
def run(tiny_config, folder):
    """A function that describes a run for the job of the tests."""

    def describe(name, overrides, resume_from=None, model=None):
        config = tiny_config(**overrides, **{"checkpoint.save": str(folder / name)})
        config.logger.metrics_path = str(folder / f"{name}.jsonl")
        if model is not None:
            config.model = dataclasses.replace(read_model(model), seq_length=32)
            apply_overrides(config, overrides)
            config.checkpoint.pretrained_checkpoint = str(model)
        return {"config": config.to_dict(), "resume_from": resume_from and str(resume_from)}

    return describe


@pytest.fixture(scope="module")
def alone(run, experts, dataset, folder):
    """The report of the runs of one rank, which spreads nothing."""
    jobs = {"alone": run("alone", {}), "experts alone": run("experts alone", {}, model=experts)}
    evaluations = {"experts": {**EVALUATION, "dataset": str(dataset), "checkpoint": str(experts)}}
    report = run_ranks(1, "training_jobs.runs", {"runs": jobs, "evaluate": evaluations}, folder / "alone-job")
    assert "error" not in report, report
    return report


@pytest.fixture(scope="module")
def runs(run, source, imported, experts, dataset, folder):
    """The report of one job that makes every run which nobody interrupts, and evaluates two checkpoints."""
    half_way = folder / "tp2" / "iter_0000003"
    jobs = {name: run(name, layout) for name, layout in LAYOUTS.items()}
    jobs |= {name: run(name, layout, model=experts) for name, layout in EXPERT_LAYOUTS.items()}
    jobs |= {f"resharded {name}": run(f"resharded {name}", LAYOUTS[name], half_way) for name in RESHARDED}
    jobs["exact"] = run("exact", EXACT)
    copied = shutil.copytree(dataset, folder / "dataset")
    jobs["scratch"] = run(
        "scratch",
        {
            "checkpoint.pretrained_checkpoint": None,
            "tokenizer.tokenizer_model": str(source),
            "dataset.blend": [
                {"path": str(dataset), "weight": 0.3},
                {"path": str(copied), "weight": 0.7},
            ],
        },
    )
    evaluation = {**EVALUATION, "dataset": str(dataset)}
    evaluations = {
        "experts": {**evaluation, "checkpoint": str(experts), "expert_model_parallel_size": 2},
        "uneven": {**evaluation, "checkpoint": str(folder / "pp2 uneven"), "tensor_model_parallel_size": 2},
        "before": {**evaluation, "checkpoint": str(imported), "tensor_model_parallel_size": 2},
        "after": {**evaluation, "checkpoint": str(folder / "tp2"), "pipeline_model_parallel_size": 2},
    }
    report = run_ranks(
        2, "training_jobs.runs", {"runs": jobs, "evaluate": evaluations}, folder / "uninterrupted"
    )
    assert "error" not in report, report
    return report


def curve(folder, name, key="loss"):
    return {
        record["iteration"]: record[key] for record in read_metrics(folder / f"{name}.jsonl") if key in record
    }


def test_loss_goes_down(runs, folder):
    losses = curve(folder, "tp2")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1] - 0.3
    before, after = runs["evaluate"]["before"], runs["evaluate"]["after"]
    assert after["loss"] < before["loss"] - 0.3
    assert before["num_tokens"] == after["num_tokens"] == 15 * 32
    assert runs["runs"]["tp2"]["loss"] == losses[6]
    assert runs["evaluate"]["uneven"]["loss"] == pytest.approx(after["loss"], rel=AGREEMENT)


def test_held_out_loss_with_experts_on_two_ranks_is_that_of_one(runs, alone):
    """The other layers are there twice, and an odd number of samples is read by both."""
    spread, whole = runs["evaluate"]["experts"], alone["evaluate"]["experts"]
    assert spread["num_tokens"] == whole["num_tokens"] == 15 * 32
    assert spread["loss"] == pytest.approx(whole["loss"], rel=AGREEMENT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", ["loss", "grad_norm", "validation_loss"])
def test_layouts_agree_with_one_rank(runs, alone, folder, layout, key):
    assert len(curve(folder, "alone", key)) == {"validation_loss": 2}.get(key, 6)
    assert curve(folder, layout, key) == pytest.approx(curve(folder, "alone", key), rel=AGREEMENT)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("key", ["loss", "grad_norm", "validation_loss"])
def test_layouts_of_experts_agree_with_one_rank(runs, alone, folder, layout, key):
    expected = curve(folder, "experts alone", key)
    assert curve(folder, layout, key) == pytest.approx(expected, rel=AGREEMENT)
    assert expected[6] < expected[3]


@pytest.mark.parametrize("layout", RESHARDED)
def test_resharded_checkpoint_goes_on(runs, folder, layout):
    losses = curve(folder, f"resharded {layout}")
    expected = {iteration: loss for iteration, loss in curve(folder, "tp2").items() if iteration > 3}
    assert losses == pytest.approx(expected, rel=AGREEMENT)


def test_metrics_are_complete(runs, folder):
    record = read_metrics(folder / "tp2.jsonl")[2]
    assert set(record) == {
        *("iteration", "train_iters", "loss", "learning_rate", "grad_norm", "seconds", "time"),
        *("tokens_per_second", "tokens_per_second_per_gpu", "tflops_per_gpu", "consumed_samples"),
        *("data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds"),
        *("validation_loss", "checkpoint_seconds"),
    }
    assert (record["iteration"], record["train_iters"], record["consumed_samples"]) == (3, 6, 24)


def test_checkpoint_is_exported(runs, folder, source):
    """An iteration folder carries all that an export needs, and the export is a Hugging Face checkpoint."""
    export_checkpoint(folder / "exact", folder / "exported")
    comparison = compare_ledgers(ledger(source), ledger(folder / "exported"))
    assert not comparison.names(ONLY_A)
    assert not comparison.names(ONLY_B)
    assert len(comparison.names(DIFFERENT)) > 10
    assert AutoModelForCausalLM.from_pretrained(folder / "exported").config.vocab_size == 300
    assert (folder / "exported" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    # 300 tokens on two ranks are 512 rows
    assert (
        json.loads((folder / "exact" / "iter_0000030" / "model.json").read_text())["num_padding_rows"] == 212
    )
    config = json.loads((folder / "exact" / "iter_0000030" / "run_config.json").read_text())
    assert config["model"]["hidden_dropout"] == 0.1


def test_random_weights_and_a_blend(runs, folder, source):
    assert curve(folder, "scratch")[6] < curve(folder, "scratch")[1] - 0.3
    export_checkpoint(folder / "scratch", folder / "from-scratch")
    comparison = compare_ledgers(ledger(source), ledger(folder / "from-scratch"))
    assert not comparison.names(ONLY_A)
    assert not comparison.names(ONLY_B)
    assert AutoTokenizer.from_pretrained(folder / "from-scratch").vocab_size == 300


def test_datasets_are_left_as_they_were(runs, dataset):
    files = [f"{split}.{kind}" for split in ("test", "train", "valid") for kind in ("bin", "idx")]
    assert sorted(path.name for path in dataset.iterdir()) == sorted(["dataset.json", *files])


def start(folder: Path, job: Path, hold: str | None = None, wait_at: int | None = None) -> subprocess.Popen:
    job.write_text(json.dumps({**json.loads(job.read_text()), "hold": hold, "wait_at": wait_at}))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "bridge.job", "training_jobs.held", str(job)),
        ],
        env={**os.environ, **ENVIRONMENT},
        stdout=(folder / "log.txt").open("ab"),
        stderr=subprocess.STDOUT,
    )


def wait_until(condition, process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + LONGEST
    while not condition():
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stopped_and_killed_run_ends_like_one_that_was_not(runs, tiny_config, imported, folder):
    output, metrics, report = (folder / name for name in ("killed", "killed.jsonl", "killed.report.json"))
    job = folder / "killed.json"
    # torchrun sends SIGTERM to those who read ahead, too
    config = tiny_config(**EXACT, **{"dataset.num_workers": 1})
    settings = {"config": config.to_dict(), "load": str(imported), "output": str(output)}
    job.write_text(json.dumps({**settings, "metrics": str(metrics), "report": str(report)}))

    # in the third iteration, of four micro-batches
    process = start(folder, job, wait_at=9)
    wait_until(lambda: len(read_metrics(metrics)) == 2, process, folder)
    process.send_signal(signal.SIGTERM)
    process.wait(LONGEST)
    stopped = json.loads(report.read_text())
    assert stopped["stopped"]
    assert stopped["iteration"] == 3
    assert [path.name for path in complete_checkpoints(output)] == ["iter_0000003"]

    # while both ranks write
    process = start(folder, job, hold="iter_0000016")
    wait_until(lambda: len(list(output.glob("iter_0000016.*.partial/*.distcp"))) >= 2, process, folder)
    process.kill()
    process.wait(LONGEST)
    # ranks die with their agent, and writers with their rank: a new run waits for their lock
    assert complete_checkpoints(output)[-1].name == "iter_0000008"

    assert start(folder, job).wait(LONGEST) == 0, (folder / "log.txt").read_text()[-3000:]
    assert not list(output.glob("*.partial"))
    for key in ("loss", "grad_norm", "validation_loss", "learning_rate"):
        assert curve(folder, "killed", key) == curve(folder, "exact", key), key
    last = [run / "iter_0000030" for run in (output, folder / "exact")]
    assert not compare_ledgers(*map(ledger, last)).names(DIFFERENT)
    assert (output / "latest_checkpointed_iteration.txt").read_text() == "30\n"


def test_a_jobs_config_names_no_other_places(tiny_config, imported):
    job = {"output": "run", "load": str(imported), "metrics": None}
    config = tiny_config()
    take_places(config, job)
    assert config.checkpoint.save == "run"
    take_places(config, job)
    with pytest.raises(ConfigError, match=r"pretrained_checkpoint is .* and its 'load' is /elsewhere: leave"):
        take_places(config, {**job, "load": "/elsewhere"})


def test_exit_code_of_a_stopped_run_is_its_own():
    assert EXIT_STOPPED not in (0, 1, 2)
