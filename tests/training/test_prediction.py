"""Real runs of a model with multi-token prediction: two ranks agree with one, also after a resume."""

from pathlib import Path

import pytest
from checkpoints import make_hf_checkpoint
from process_groups import run_ranks

from bridge.importer import import_checkpoint
from bridge.ledger import DIFFERENT, EQUAL, compare_ledgers, ledger
from bridge.megatron_checkpoint import read_model
from training.metrics import read_metrics
from training.overrides import apply_overrides

SETTINGS = {
    "model.seq_length": 32,
    "train.train_iters": 4,
    "train.eval_interval": 2,
    "checkpoint.save_interval": 2,
    "mixed_precision.bf16": False,
    "model.moe_router_load_balancing_type": "seq_aux_loss",
    "model.moe_aux_loss_coeff": 0.001,
    "model.moe_z_loss_coeff": 0.001,
    # larger steps soon make rounding decide about experts
    "optimizer.lr": 0.001,
}
PP2 = {"model.pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2": {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
    "pp2": PP2,
    "ep2": {"model.expert_model_parallel_size": 2},
}
MORE_LAYOUTS = {
    "pp2 vpp2": {**PP2, "model.virtual_pipeline_model_parallel_size": 2},
    "pp2 vpp2 prediction alone": {
        **PP2,
        "model.virtual_pipeline_model_parallel_size": 2,
        "model.pipeline_model_parallel_layout": "Et|tt|t|mmL",
    },
    "cp2": {"model.context_parallel_size": 2},
    "dp2 overlapped": {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True},
    "recomputed": {
        "model.recompute_granularity": "full",
        "model.recompute_method": "uniform",
        "model.recompute_num_layers": 1,
    },
}
# of float32 sums in another order; each iteration adds to the difference
AGREEMENT = 2e-5
# from, to
RESUMED = (("ep2", "pp2"),)
MORE_RESUMED = (("tp2", "tp2"), ("pp2", "pp2"), ("ep2", "ep2"), ("pp2", "tp2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prediction")


@pytest.fixture(scope="module")
def train(tiny_config, folder):
    """A function that makes the runs in these layouts, and those that go on half way through another one."""
    source = make_hf_checkpoint(
        folder / "hf", "deepseek_v3", dtype="float32", vocab_size=300, num_nextn_predict_layers=2
    )
    import_checkpoint(source, folder / "megatron")

    def describe(name, layout, resume_from=None):
        config = tiny_config(**{"checkpoint.save": str(folder / name)})
        config.logger.metrics_path = str(folder / f"{name}.jsonl")
        config.model = read_model(folder / "megatron")
        config.checkpoint.pretrained_checkpoint = str(folder / "megatron")
        apply_overrides(config, {**SETTINGS, **layout})
        return {"config": config.to_dict(), "resume_from": resume_from and str(resume_from)}

    def start(ranks, layouts, resumed=()):
        jobs = {name: describe(name, layout) for name, layout in layouts.items()}
        for before, after in resumed:
            name = f"{before} to {after}"
            jobs[name] = describe(name, LAYOUTS[after], folder / before / "iter_0000002")
        job = folder / f"job-{'-'.join(layouts)}"
        report = run_ranks(ranks, "training_jobs.runs", {"runs": jobs, "evaluate": {}}, job)
        assert "error" not in report, report

    return start


@pytest.fixture(scope="module")
def runs(train):
    train(1, {"alone": {}})
    train(2, LAYOUTS, RESUMED)


@pytest.fixture(scope="module")
def more_runs(runs, train):
    train(2, MORE_LAYOUTS, MORE_RESUMED)


def curve(folder, name, key="loss"):
    return {line["iteration"]: line[key] for line in read_metrics(folder / f"{name}.jsonl") if key in line}


KEYS = ("loss", "grad_norm", "seq_load_balancing_loss", "z_loss", "mtp_1_loss", "mtp_2_loss")


def check_layout(folder, layout):
    # with a sequence in parts, ranks have different numbers of tokens to predict, and count alike
    keys = [key for key in KEYS if layout != "cp2" or not key.startswith("mtp_")]
    for key, lines in {**dict.fromkeys(keys, 4), "validation_loss": 2}.items():
        expected = curve(folder, "alone", key)
        assert len(expected) == lines
        assert curve(folder, layout, key) == pytest.approx(expected, rel=AGREEMENT), key


def check_resumed(folder, before, after):
    for key in ("loss", "grad_norm"):
        found = curve(folder, f"{before} to {after}", key)
        expected = {number: value for number, value in curve(folder, before, key).items() if number > 2}
        assert list(found) == [3, 4]
        assert found == (expected if before == after else pytest.approx(expected, rel=AGREEMENT)), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_one_rank(runs, folder, layout):
    check_layout(folder, layout)


@pytest.mark.parametrize(("before", "after"), RESUMED)
def test_a_checkpoint_goes_on_in_another_layout(runs, folder, before, after):
    check_resumed(folder, before, after)


def test_the_prediction_layers_learn_too(runs, folder):
    """Else layouts could agree about a gradient that none of them computes."""
    checkpoints = [ledger(folder / "ep2" / name) for name in ("iter_0000002", "iter_0000004")]
    comparison = compare_ledgers(*checkpoints)
    prefixes = ("model.layers.4.", "model.layers.5.")
    assert len([name for name in comparison.names(DIFFERENT) if name.startswith(prefixes)]) > 40
    equal = [name for name in comparison.names(EQUAL) if name.startswith(prefixes)]
    assert not equal


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_more_layouts_agree_with_one_rank(more_runs, folder, layout):
    check_layout(folder, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), MORE_RESUMED)
def test_more_checkpoints_go_on(more_runs, folder, before, after):
    check_resumed(folder, before, after)
