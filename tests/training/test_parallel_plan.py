import dataclasses
from typing import Any

import pytest

from bridge.errors import ConfigError
from bridge.pipeline_split import layers_of_stage, layers_per_chunk
from recipes.llama import (
    llama3_8b_pretrain_config,
    llama31_70b_pretrain_config,
    llama31_405b_pretrain_config,
    llama32_1b_pretrain_config,
)
from recipes.qwen3_moe import qwen3_30b_a3b_pretrain_config
from training.memory_estimate import ModelSize, estimate_memory
from training.parallel_plan import USABLE, plan_parallel, setting
from training.plan_table import plan_rows
from training.precision import mixed_precision
from training.time_estimate import GPUS, gpu_named, messages

H100, H200 = GPUS["h100"], GPUS["h200"]


def test_a_small_model_is_not_split() -> None:
    layout = plan_parallel(llama32_1b_pretrain_config(), 8, H100).best.layout
    assert layout.tensor_model_parallel_size == layout.pipeline_model_parallel_size == 1
    assert not layout.recompute


def test_a_large_model_is_split_as_little_as_it_must_be() -> None:
    plan = plan_parallel(llama31_70b_pretrain_config(), 64, H100)
    assert plan.best.memory.total <= H100.memory * USABLE * 2**30
    assert any(each.total_seconds < plan.best.total_seconds for each in plan.too_large)
    assert all(each.total_seconds >= plan.best.total_seconds for each in plan.fitting)


def test_layers_that_no_power_of_two_divides_leave_outer_stages_smaller() -> None:
    """126 layers with embedding and loss are 128."""
    config = llama31_405b_pretrain_config(parallelism="auto", num_gpus=512, gpu="h100")
    config.validate(512)
    counts = layers_per_chunk(config.model)
    assert sum(counts) == 126
    assert counts[0] == counts[-1] == counts[1] - 1
    stages = [layers_of_stage(config.model, s) for s in range(config.model.pipeline_model_parallel_size)]
    assert sorted(layer for stage in stages for layer in stage) == list(range(126))


def test_experts_of_one_rank_each_stay_in_a_node() -> None:
    """Their group is of neighbours, whatever the tensor size; split over ranks it reaches beyond a node."""
    model = (config := qwen3_30b_a3b_pretrain_config(expert_model_parallel_size=8)).model
    inside = messages(config, 64, H100, size := ModelSize(model))["expert"]
    model.expert_tensor_parallel_size = None
    assert messages(config, 64, H100, size)["expert"] == pytest.approx(inside * H100.nvlink / H100.network)


def test_every_layout_that_is_offered_can_run() -> None:
    config = llama3_8b_pretrain_config()
    for estimate in plan_parallel(config, 16, H100).fitting:
        estimate.layout.apply(config).validate(16)


def test_more_memory_never_makes_it_slower() -> None:
    config = llama31_70b_pretrain_config()
    more = dataclasses.replace(H100, memory=2 * H100.memory)
    slow, quick = (plan_parallel(config, 64, gpu).best.total_seconds for gpu in (H100, more))
    assert quick <= slow


def test_what_fits_nowhere_is_refused_with_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"needs .* GiB a GPU of 73: take more"):
        plan_parallel(llama31_70b_pretrain_config(), 1, H100).best  # noqa: B018


def test_a_batch_that_no_layout_divides_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch_size 512"):
        plan_parallel(llama32_1b_pretrain_config(), 7, H100)


def test_recipe_takes_the_planned_layout() -> None:
    config = llama3_8b_pretrain_config(parallelism="auto", num_gpus=8, gpu="h200")
    best = plan_parallel(llama3_8b_pretrain_config(), 8, H200).best
    assert config.train.micro_batch_size == best.layout.micro_batch_size
    assert estimate_memory(config, 8) == best.memory


def test_a_plan_keeps_what_a_recipe_is_given_and_shows_its_table(capsys) -> None:
    given = {"tensor_model_parallel_size": 4, "micro_batch_size": 4, "recompute_granularity": "full"}
    config = llama3_8b_pretrain_config(parallelism="auto", num_gpus=8, **given)
    assert {name: setting(config, f"model.{name}") for name in given if name[0] != "m"} == {
        "tensor_model_parallel_size": 4,
        "recompute_granularity": "full",
    }
    assert config.train.micro_batch_size == 4
    config.validate(8)
    shown = capsys.readouterr().err
    assert "chosen" in shown
    assert "as given: model.recompute_granularity, model.tensor_model_parallel_size" in shown


def test_what_is_given_and_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match=r"or leave model.tensor_model_parallel_size .* not divisible"):
        llama3_8b_pretrain_config(parallelism="auto", num_gpus=12, tensor_model_parallel_size=3)
    with pytest.raises(ConfigError, match=r"num_layers 32 is not divisible by the 5 pipeline stages"):
        llama3_8b_pretrain_config(parallelism="auto", num_gpus=10, pipeline_model_parallel_size=5)
    with pytest.raises(ConfigError, match=r"take more, or leave train.micro_batch_size to the plan"):
        llama3_8b_pretrain_config(parallelism="auto", num_gpus=1, micro_batch_size=8)


def test_the_configs_own_layout_does_not_matter() -> None:
    own = llama32_1b_pretrain_config(
        pipeline_model_parallel_size=2,
        num_layers_in_first_pipeline_stage=5,
        recompute_granularity="selective",
        recompute_modules=["mlp"],
    )
    plan, plain = (plan_parallel(each, 8, H100) for each in (own, llama32_1b_pretrain_config()))
    assert plan.fitting == plain.fitting
    assert plan.choice.validate(8) == plain.choice.validate(8)


def test_a_split_that_is_given_stays() -> None:
    config = llama32_1b_pretrain_config(num_layers_in_first_pipeline_stage=4)
    plan = plan_parallel(config, 16, H100, ["model.num_layers_in_first_pipeline_stage"])
    stages = {each.layout.pipeline_model_parallel_size for each in plan.fitting}
    assert stages == {2, 4}
    assert plan.choice.model.num_layers_in_first_pipeline_stage == 4


@pytest.mark.parametrize(
    ("precision", "gpu"),
    [("bf16_with_mxfp8_mixed", "h100"), ("bf16_with_fp8_delayed_scaling_mixed", "a100-80gb")],
)
def test_a_precision_that_the_gpu_lacks_is_refused(precision: str, gpu: str) -> None:
    config = llama32_1b_pretrain_config()
    config.mixed_precision = mixed_precision(precision)
    with pytest.raises(ConfigError, match="needs a GPU of compute capability"):
        plan_parallel(config, 8, gpu_named(gpu))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parallelism": "best"}, "best"),
        ({"parallelism": "auto", "gpu": "tpu"}, "tpu"),
        ({"num_gpus": 8}, "give 'auto' beside num_gpus"),
        ({"parallelism": "auto"}, "num_gpus is None"),
    ],
)
def test_unknown_words_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        llama3_8b_pretrain_config(**changes)


def test_rows_say_why() -> None:
    rows = plan_rows(plan_parallel(llama31_70b_pretrain_config(), 64, H100))
    assert [row["verdict"] for row in rows].count("chosen") == 1
    assert rows[0]["verdict"] == "chosen"
    assert rows[-1]["verdict"] == "does not fit"
    parts = [
        rows[0][f"{part}_gib"] for part in ("weights", "gradients", "optimizer", "activations", "logits")
    ]
    assert sum(parts) == pytest.approx(rows[0]["memory_gib"], abs=0.3)


def test_known_gpus_are_named() -> None:
    with pytest.raises(ConfigError, match="h200"):
        gpu_named("h300")
