"""A tiny run from random weights: the same bits every time, and the losses that were written down."""

import pytest
from process_groups import run_ranks

from recipes.llama import llama32_1b_pretrain_config
from training.metrics import read_metrics

TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "seq_length": 32,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "train_iters": 5,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "eval_interval": None,
    "lr": 0.01,
}
PRECISIONS = ("fp32", "bf16_mixed")
# torch 2.15 on x86-64; another kind of CPU adds in another order
GOLDEN = {
    "fp32": [6.2370622, 6.0583892, 6.0791852, 5.9322958, 6.0267882],
    "bf16_mixed": [6.2370243, 6.0603621, 6.0828016, 5.9477184, 6.025908],
}
TOLERANCE = {"fp32": 1e-5, "bf16_mixed": 1e-3}


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[float]]:
    """The losses of every precision, twice, in one job."""
    folder = tmp_path_factory.mktemp("golden")
    runs = {}
    for name in [f"{precision}-{number}" for precision in PRECISIONS for number in (1, 2)]:
        config = llama32_1b_pretrain_config(**TINY, mixed_precision=name.split("-")[0])
        config.model.vocab_size = 500
        config.logger.metrics_path = str(folder / f"{name}.jsonl")
        runs[name] = {"config": config.to_dict()}
    report = run_ranks(1, "training_jobs.runs", {"runs": runs, "evaluate": {}}, folder / "job")
    assert "error" not in report, report
    return {name: [line["loss"] for line in read_metrics(folder / f"{name}.jsonl")] for name in runs}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_runs_have_the_same_bits(losses, precision):
    assert losses[f"{precision}-1"] == losses[f"{precision}-2"]
    assert len(set(losses[f"{precision}-1"])) == 5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_are_those_written_down(losses, precision):
    found = losses[f"{precision}-1"]
    assert found == pytest.approx(GOLDEN[precision], rel=TOLERANCE[precision])
