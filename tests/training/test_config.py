import json

import pytest

from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider
from recipes.llama import llama32_1b_pretrain_config
from training.config import ConfigContainer
from training.overrides import apply_overrides


def config(**overrides) -> ConfigContainer:
    result = llama32_1b_pretrain_config()
    return apply_overrides(result, {"train.global_batch_size": 8, **overrides})


def test_json_both_ways():
    original = config(**{"dataset.blend": [0.3, "a", 0.7, "b"], "model.window_size": [3, 0]})
    read = ConfigContainer.from_dict(json.loads(json.dumps(original.to_dict())))
    assert read == original
    assert read.to_dict() == original.to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"trian": {}}, "unknown config section 'trian'"),
        ({"train": {"train_iter": 1}}, "did you mean 'train.train_iters'"),
        ({"model": {"num_layer": 1}}, "unknown model setting 'num_layer'"),
    ],
)
def test_unknown_names_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        ConfigContainer.from_dict(value)


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ({"train.train_iters": 0}, 1, "train.train_iters is 0"),
        ({"train.eval_interval": 0}, 1, "train.eval_interval is 0"),
        ({"train.micro_batch_size": 3}, 1, "give a multiple of 3"),
        ({"train.micro_batch_size": 2}, 8, "x data-parallel size = 16"),
        ({"model.tensor_model_parallel_size": 2}, 3, "3 ranks cannot hold whole copies"),
        ({"model.tensor_model_parallel_size": 3}, 3, "num_attention_heads 32 is not divisible"),
        (
            {"model.num_moe_experts": 8, "model.expert_model_parallel_size": 2},
            1,
            "1 ranks cannot hold experts",
        ),
        (
            {"model.num_moe_experts": 8, "model.tensor_model_parallel_size": 2},
            2,
            "set model.sequence_parallel to true",
        ),
        ({"scheduler.lr_decay_style": "cosin"}, 1, "allowed are constant, linear, cosine"),
        ({"scheduler.lr_decay_style": "WSD"}, 1, "needs scheduler.lr_wsd_decay_iters"),
        ({"train.train_iters": 10, "scheduler.lr_warmup_iters": 10}, 1, "give 0 to 9"),
        ({"optimizer.min_lr": 1.0}, 1, "optimizer.min_lr is 1.0"),
        ({"dataset.blend": [["a"], [1.0, 2.0]]}, 1, "2 weights for 1 paths"),
        (
            {
                "model.pipeline_model_parallel_size": 4,
                "model.virtual_pipeline_model_parallel_size": 2,
                "train.global_batch_size": 6,
            },
            4,
            "cannot run 6 microbatches",
        ),
    ],
)
def test_contradictions_are_refused(overrides, ranks, message):
    with pytest.raises(ConfigError, match=message):
        config(**overrides).validate(ranks)


def test_validate_spreads_what_is_said_once():
    checked = config(**{"model.tensor_model_parallel_size": 2, "mixed_precision.bf16": False}).validate(4)
    assert checked.model.params_dtype == "float32"
    assert checked.data_parallel_size(4) == 2
    assert checked.num_microbatches(4) == 4


def test_names_are_megatrons():
    """What is handed to Megatron Core is spelt as there."""
    import dataclasses

    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    def names(section: type) -> set[str]:
        return {field.name for field in dataclasses.fields(section)}

    sections = ConfigContainer(model=GPTModelProvider())
    assert names(type(sections.optimizer)) <= names(OptimizerConfig)
    assert names(type(sections.ddp)) <= names(DistributedDataParallelConfig)
