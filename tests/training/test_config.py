import json
import re

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
        ({"train.micro_batch_size": 2}, 8, "x data_parallel_size = 16"),
        (
            {"model.tensor_model_parallel_size": 2},
            3,
            "3 ranks cannot hold whole copies.*: tensor_model_parallel_size 2 x",
        ),
        ({"model.tensor_model_parallel_size": 3}, 3, "num_attention_heads 32 is not divisible"),
        (
            {"model.num_moe_experts": 8, "model.expert_model_parallel_size": 2},
            1,
            "expert_model_parallel_size 2 x expert_tensor_parallel_size 1",
        ),
        ({"model.expert_tensor_parallel_size": 2}, 1, "expert_tensor_parallel_size is 2 in a model without"),
        ({"model.sequence_parallel": True}, 1, "choose that or set it to false"),
        (
            {"model.context_parallel_size": 2, "model.seq_length": 30},
            2,
            "model.seq_length 30 cannot be shared out with context_parallel_size 2",
        ),
        (
            {
                "model.tensor_model_parallel_size": 8,
                "model.context_parallel_size": 2,
                "model.sequence_parallel": True,
                "model.seq_length": 24,
            },
            16,
            "give a multiple of 16",
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
        ({"train.manual_gc_interval": 0}, 1, "train.manual_gc_interval is 0"),
        ({"mixed_precision.fp16": True}, 1, "both true"),
        ({"optimizer.exp_avg_dtype": "int8"}, 1, "allowed are float32, float16"),
        ({"optimizer.exp_avg_dtype": "bfloat16"}, 1, "needs optimizer.use_precision_aware_optimizer"),
        ({"optimizer.optimizer_cpu_offload": True}, 1, "needs optimizer.use_precision_aware_optimizer"),
        (
            {
                "optimizer.optimizer_cpu_offload": True,
                "optimizer.use_precision_aware_optimizer": True,
                "optimizer.exp_avg_dtype": "bfloat16",
            },
            1,
            "keeps the optimizer in float32: leave out optimizer.exp_avg_dtype",
        ),
        ({"comm_overlap.tp_comm_overlap": True}, 1, "hides the messages of sequence parallelism"),
        ({"comm_overlap.defer_embedding_wgrad_compute": True}, 1, "needs pipeline_model_parallel_size > 1"),
        ({"ddp.overlap_grad_reduce": False}, 1, "overlap_param_gather needs ddp.overlap_grad_reduce"),
        ({"optimizer.adam_beta1": 1.5}, 1, "optimizer.adam_beta1 is 1.5: give 0 or more, less than 1"),
        ({"optimizer.clip_grad": float("nan")}, 1, "optimizer.clip_grad is nan: give a number"),
        ({"optimizer.lr": float("inf")}, 1, "optimizer.lr is inf: give a number"),
        ({"optimizer.adam_eps": 0.0}, 1, "optimizer.adam_eps is 0.0: give more than 0"),
        ({"train.micro_batch_size": 0}, 1, "train.micro_batch_size is 0: give 1 or more"),
        ({"model.make_vocab_size_divisible_by": 0}, 1, "is 0: give 1 or more"),
        ({"model.virtual_pipeline_model_parallel_size": 0}, 1, "is 0: give 1 or more"),
        ({"model.hidden_dropout": 2.0}, 1, "model.hidden_dropout is 2.0"),
        ({"rng.seed": -1}, 1, "rng.seed is -1: give 0 or more"),
        ({"scheduler.lr_decay_iters": 0}, 1, "scheduler.lr_decay_iters is 0: give 1 or more"),
        ({"scheduler.lr_warmup_init": 5.0}, 1, "scheduler.lr_warmup_init is 5.0: give 0 to optimizer.lr"),
        (
            {"scheduler.lr_decay_style": "WSD", "scheduler.lr_wsd_decay_iters": 10**7},
            1,
            "scheduler.lr_wsd_decay_iters is 10000000: give at most the",
        ),
        ({"model.recompute_granularity": "foo"}, 1, "allowed are null, selective, full"),
        (
            {"model.recompute_granularity": "selective", "model.recompute_modules": ["foo"]},
            1,
            "model.recompute_modules has 'foo': allowed are core_attn",
        ),
        (
            {
                "model.recompute_granularity": "full",
                "model.recompute_method": "block",
                "model.recompute_num_layers": 100,
            },
            1,
            "model.recompute_num_layers is 100: the model has 16",
        ),
        ({"model.activation_func": "foo"}, 1, "model.activation_func is 'foo': allowed are silu"),
        ({"model.normalization": "foo"}, 1, "allowed are RMSNorm, LayerNorm"),
        (
            {"profiling.use_nsys_profiler": True, "profiling.profile_step_start": 10**7 - 1}
            | {"profiling.profile_step_end": 10**7},
            1,
            "begins with iteration 9999999, but the run ends with",
        ),
        (
            {"profiling.use_nsys_profiler": True, "profiling.profile_ranks": [2]},
            2,
            "give ranks of 0 to 1",
        ),
        ({"model.recompute_modules": ["mlp"]}, 1, "needs model.recompute_granularity selective"),
        ({"model.recompute_granularity": "full"}, 1, "needs model.recompute_method"),
        (
            {"model.recompute_method": "uniform"},
            1,
            "recompute_method needs model.recompute_granularity full",
        ),
        (
            {"model.recompute_granularity": "selective", "model.recompute_num_layers": 1},
            1,
            "model.recompute_num_layers needs model.recompute_granularity full",
        ),
        ({"model.cpu_offloading_num_layers": 2}, 1, "needs model.cpu_offloading: set it to true"),
        ({"scheduler.lr_wsd_decay_iters": 2}, 1, "is for scheduler.lr_decay_style WSD, not cosine"),
        (
            {"scheduler.lr_warmup_iters": 0, "scheduler.lr_warmup_init": 1e-5},
            1,
            "scheduler.lr_warmup_init is for a warm-up",
        ),
        ({"tokenizer.vocab_size": 10**7}, 1, "tokenizer.vocab_size is 10000000: give at most the model's"),
        (
            {"model.num_moe_experts": 8, "model.moe_token_dispatcher_type": "flex"},
            1,
            "flex sends tokens between ranks",
        ),
        ({"model.qk_layernorm_scope": "all"}, 1, "allowed are head, layer"),
        ({"model.moe_router_score_function": "tanh"}, 1, "allowed are softmax, sigmoid"),
        ({"model.moe_router_dtype": "bf16"}, 1, "allowed are null, fp32, fp64"),
        (
            {"model.num_moe_experts": 8, "model.moe_aux_loss_coeff": 0.1}
            | {"model.moe_router_load_balancing_type": "sinkhorn"},
            1,
            "sinkhorn balances without a loss: set model.moe_aux_loss_coeff to 0",
        ),
        ({"model.cpu_offloading": True}, 1, "cpu_offloading_num_layers is 0: give 1 to 15"),
        ({"checkpoint.export_interval": 5}, 1, "needs checkpoint.export_hf"),
        (
            {
                "checkpoint.export_hf": "exports",
                "checkpoint.export_interval": 5,
                "checkpoint.save_interval": 2,
            },
            1,
            "give a multiple of checkpoint.save_interval, which is 2",
        ),
        ({"profiling.profile_step_end": 5}, 1, "give an end after the start"),
        ({"profiling.use_pytorch_profiler": True}, 1, "profiling.output is null"),
        ({"resilience.on_nan": "ignore"}, 1, "allowed are stop, skip"),
        ({"resilience.spike_factor": 1.0}, 1, "give more than 1"),
        ({"resilience.max_skipped": -1}, 1, "give 0 or more"),
        ({"resilience.hang_timeout": 0.5}, 1, "resilience.hang_timeout is 0.5: give 1 or more"),
        ({"resilience.on_nan": "skip", "ddp.check_for_nan_in_grad": True}, 1, "to its default"),
        ({"model.num_layers_in_first_pipeline_stage": 2}, 1, "more than one pipeline stage"),
        (
            {"model.pipeline_model_parallel_size": 2, "model.pipeline_model_parallel_layout": "Et*3|tL"},
            2,
            "has 4 layers in 2 stages, but the model 16 in 2",
        ),
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
    from megatron.core.transformer import TransformerConfig

    from training.megatron_settings import FP8_FIELDS, LOSS_SCALE_FIELDS
    from training.run_settings import FUSIONS

    def names(section: type) -> set[str]:
        return {field.name for field in dataclasses.fields(section)}

    def types(section: type) -> dict[str, set[str]]:
        return {field.name: type_names(field.type) for field in dataclasses.fields(section)}

    def type_names(hint: object) -> set[str]:
        """Split a hint into plain types: Optional[int] and int | None are the same; Literals are strings."""
        text = hint.__name__ if isinstance(hint, type) else str(hint)
        found = set(re.findall(r"\b(bool|int|float|str|None|Optional|Literal|dtype)\b", text))
        spelt = {"Optional": "None", "Literal": "str", "dtype": "str"}
        return {spelt.get(name, name) for name in found}

    sections = ConfigContainer(model=GPTModelProvider())
    precision = names(type(sections.mixed_precision))
    assert names(type(sections.optimizer)) <= names(OptimizerConfig)
    assert names(type(sections.ddp)) <= names(DistributedDataParallelConfig)
    assert names(type(sections.comm_overlap)) <= names(TransformerConfig)
    assert set(FP8_FIELDS) | set(LOSS_SCALE_FIELDS) | {"bf16", "fp16", "grad_reduce_in_fp32"} == precision
    assert set(FUSIONS) <= names(TransformerConfig) & names(GPTModelProvider)
    for section, megatron in (
        (sections.optimizer, OptimizerConfig),
        (sections.ddp, DistributedDataParallelConfig),
        (sections.comm_overlap, TransformerConfig),
    ):
        for name, found in types(type(section)).items():
            assert found <= types(megatron)[name], name
