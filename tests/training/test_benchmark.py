import json
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.errors import ConfigError
from training import benchmark
from training.metrics import read_metrics

LONGEST = 240  # seconds, to end a hang
SHAPE = "recipes.llama:llama32_1b_pretrain_config"
TINY = [
    *("--layers", "2", "--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4"),
    *("model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.kv_channels=16", "model.vocab_size=500"),
    *("--precision", "fp32", "--steps", "3", "--warmup", "1"),
]


def configure(*arguments):
    return benchmark.configure(*benchmark.arguments([SHAPE, *TINY, *arguments]))


def run(*launcher: str, arguments: list[str]) -> tuple[str, dict]:
    command = [sys.executable, *launcher, "-m", "training.benchmark", SHAPE, *TINY, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout, json.loads(finished.stdout.splitlines()[-1])


def test_arguments_are_overrides():
    config = configure("--tensor", "2", "optimizer.lr=1")
    assert (config.model.num_layers, config.model.seq_length) == (2, 32)
    assert (config.train.train_iters, config.train.micro_batch_size) == (4, 1)
    assert (config.model.tensor_model_parallel_size, config.optimizer.lr) == (2, 1.0)
    assert not config.mixed_precision.bf16
    with pytest.raises(ConfigError, match=r"did you mean 'optimizer.lr'"):
        configure("optimizer.rl=1")
    with pytest.raises(ConfigError, match="--steps is 0: give 1 or more"):
        configure("--steps", "0")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("llama3_8b_pretrain_config", "names no function: No module named"),
        ("recipes.llama:llama9_pretrain_config", "names no function: module 'recipes.llama' has no"),
        (
            "recipes.llama:SIZE_1B",
            "is no function that returns a config: give one as recipes.llama:llama3_8b",
        ),
        ("recipes.registry:all_recipes", "is no function that returns a config"),
    ],
)
def test_shapes_that_are_none(shape, message):
    with pytest.raises(ConfigError, match=message):
        benchmark.configure(*benchmark.arguments([shape]))


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def alone(profile) -> tuple[str, dict]:
    """What a single process prints, and its numbers."""
    metrics = profile.with_name("metrics.jsonl")
    return run(
        arguments=["--profile", str(profile), "logger.peak_tflops=10", f"logger.metrics_path={metrics}"]
    )


def test_a_single_process_measures_and_profiles(alone, profile):
    text, result = alone
    assert "tokens_per_second_per_gpu" in text
    assert (result["gpus"], result["device"], len(result["losses"])) == (1, "cpu", 4)
    assert result["tokens_per_second"] == pytest.approx(4 * 32 / result["seconds"], rel=0.5)
    assert result["peak_share"] == pytest.approx(result["tflops_per_gpu"] / 10)
    parts = [f"{name}_seconds" for name in ("data", "forward", "backward", "optimizer")]
    assert all(result[part] > 0 for part in parts)
    for line in read_metrics(profile.with_name("metrics.jsonl")):
        assert sum(line[part] for part in parts) <= line["seconds"]
    assert 1 < result["seconds_to_first_step"] < LONGEST
    assert {path.name for path in profile.iterdir()} == {"rank0.operations.txt", "rank0.trace.json.gz"}


def test_ranks_share_the_work(alone):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    _, shared = run(*launcher, arguments=["--tensor", "2"])
    assert shared["gpus"] == 2
    assert shared["losses"][0] == pytest.approx(alone[1]["losses"][0], rel=0.01)  # other random weights


def test_tokens_do_not_depend_on_the_run():
    first, second = (benchmark.RandomTokens(10, 16, 100)[3]["tokens"].tolist() for _ in range(2))
    assert first == second != benchmark.RandomTokens(10, 16, 100)[4]["tokens"].tolist()
