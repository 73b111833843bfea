from typing import Any

import pytest
import torch

from bridge.families import provider_of
from recipes.llama import llama3_8b_pretrain_config
from recipes.qwen3 import qwen3_600m_pretrain_config
from recipes.qwen3_moe import qwen3_30b_a3b_pretrain_config
from recipes.registry import Recipe
from training.config import ConfigContainer
from training.memory_estimate import (
    ModelSize,
    estimate_memory,
    layer_activations,
    microbatches_in_flight,
    moe_activations,
    stage_parameters,
)
from training.precision import mixed_precision


def config(**changes: object) -> ConfigContainer:
    return llama3_8b_pretrain_config(
        context_parallel_size=1, tensor_model_parallel_size=1, global_batch_size=64, **changes
    )


def test_one_rank_has_every_parameter() -> None:
    """The count of transformers' own model of the same config, without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = qwen3_600m_pretrain_config().model
    with torch.device("meta"):
        judge = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.hf_config))
    model.make_vocab_size_divisible_by = 1
    assert stage_parameters(model, ModelSize(model), 0).total == judge.num_parameters()


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_ranks_share_the_parameters_out(tensor: int, pipeline: int) -> None:
    """Norms are on every tensor-parallel rank; everything else is somewhere once."""
    model = llama3_8b_pretrain_config(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, context_parallel_size=1
    ).model.finalize()
    model.make_vocab_size_divisible_by = 1
    size = ModelSize(model)
    norms = sum(layer["replicated"] for layer in size.layers) + model.hidden_size
    held = sum(stage_parameters(model, size, stage).total for stage in range(pipeline)) * tensor
    assert held == 8_030_261_248 + norms * (tensor - 1)


@pytest.mark.parametrize(
    ("settings", "bytes_a_parameter"),
    [
        ({}, 12),
        ({"mixed_precision": "fp32"}, 8),
        ({"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "uint8"}, 7),
        ({"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.75}, 3),
    ],
)
def test_the_optimizer_takes_what_its_types_and_the_host_leave(
    settings: dict[str, object], bytes_a_parameter: int
) -> None:
    made = config(**settings)
    one = estimate_memory(made, 1)
    parameters = one.weights // (4 if made.mixed_precision.params_dtype == "float32" else 2)
    assert one.optimizer == bytes_a_parameter * parameters


def test_activations_in_fp32_have_twice_the_bytes() -> None:
    half, whole = (estimate_memory(config(mixed_precision=name), 8) for name in ("bf16_mixed", "fp32"))
    assert whole.activations == 2 * half.activations


@pytest.mark.parametrize("settings", [{}, {"recompute_granularity": "full", "recompute_method": "uniform"}])
def test_twice_the_batch_takes_twice_the_activations(settings: dict[str, str]) -> None:
    small, large = (estimate_memory(config(micro_batch_size=size, **settings), 8) for size in (1, 2))
    assert large.activations == pytest.approx(2 * small.activations)
    assert large.logits == 2 * small.logits
    assert (large.weights, large.optimizer) == (small.weights, small.optimizer)


def test_recomputation_keeps_layer_inputs_only() -> None:
    kept = estimate_memory(config(recompute_granularity="full", recompute_method="uniform"), 8).activations
    model = config().model
    inputs = 2 * model.hidden_size * model.num_layers * model.seq_length
    assert kept == inputs + layer_activations(model, moe=False) * model.seq_length


@pytest.mark.parametrize(("number", "inputs", "whole"), [(1, 1, 31), (8, 8, 24), (32, 32, 0)])
def test_a_block_of_each_chunk_is_recomputed(number: int, inputs: int, whole: int) -> None:
    settings = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": number}
    model = (made := config(**settings)).model
    layer = layer_activations(model, moe=False)
    kept = inputs * 2 * model.hidden_size + (whole + 1) * layer
    assert estimate_memory(made, 8).activations == kept * model.seq_length


def test_layers_recomputed_together_need_room_together() -> None:
    made = config(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=4)
    kept = 8 * 2 * made.model.hidden_size + 4 * layer_activations(made.model, moe=False)
    assert estimate_memory(made, 8).activations == kept * made.model.seq_length


def test_more_copies_share_the_optimizer_state() -> None:
    assert estimate_memory(config(), 8).optimizer * 8 == pytest.approx(estimate_memory(config(), 1).optimizer)


def test_stages_hold_what_the_schedule_has_under_way() -> None:
    pipeline = config(pipeline_model_parallel_size=4)
    assert [microbatches_in_flight(pipeline, 8, stage) for stage in range(4)] == [4, 3, 2, 1]
    interleaved = config(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    assert microbatches_in_flight(interleaved, 8, 0) == (2 * 3 + 4 + 1) / 2


def test_saved_tensors_of_a_layer() -> None:
    """Bytes a token of a Llama layer in bf16, added up by hand: norms, q k v, attention, SwiGLU."""
    model = provider_of(llama3_8b_pretrain_config().model.hf_config)
    norms, attention, mlp = 4 * 2 * 4096, 2 * (4096 + 1024 + 1024 + 4096) + 4 * 32, 2 * 3 * 14336
    assert layer_activations(model, moe=False) == norms + attention + mlp


def test_experts_keep_their_part_of_the_sequence() -> None:
    """Split over tensor ranks they gather it whole; alone on a rank they see a quarter of it."""
    model = qwen3_30b_a3b_pretrain_config().model
    norm, chosen, copies = 4 * 2048, 8, 2 * 2 * 2048
    products, scores = 2 * 3 * 768, 3 * 4 * 128
    assert model.tensor_model_parallel_size == 4
    assert moe_activations(model, 2) == (norm + chosen * (copies + products) + scores) / 4
    model.expert_tensor_parallel_size = None
    assert moe_activations(model, 2) == (norm + chosen * (4 * copies + products) + scores) / 4


ONE_COPY = {
    **{f"{kind}_model_parallel_size": 1 for kind in ("tensor", "pipeline", "expert")},
    "context_parallel_size": 1,
    "expert_tensor_parallel_size": None,
}
LLAMA, QWEN = llama3_8b_pretrain_config, qwen3_30b_a3b_pretrain_config
FP8 = "bf16_with_fp8_delayed_scaling_mixed"
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
# Layers, sequence, micro batch, global batch, GPUs, other settings; GiB at the peak of rank 0 of H200s, as
# docs/benchmarks.md has them.
MEASURED = [
    (LLAMA, (8, 4096, 2, 16, 1), {}, 59),
    (LLAMA, (8, 4096, 4, 16, 1), {}, 70),
    (LLAMA, (8, 4096, 2, 16, 1), {"precision": FP8}, 61),
    (LLAMA, (8, 4096, 4, 16, 1), {"precision": FP8}, 71),
    (LLAMA, (8, 4096, 4, 64, 4), {"precision": FP8}, 47),
    (LLAMA, (32, 8192, 1, 64, 4), {}, 105),
    (LLAMA, (32, 8192, 1, 64, 4), {"precision": FP8}, 113),
    (LLAMA, (16, 8192, 1, 4, 2), {"tensor_model_parallel_size": 2}, 48.6),
    (LLAMA, (16, 8192, 1, 8, 2), {"pipeline_model_parallel_size": 2}, 56.0),
    (
        LLAMA,
        (16, 8192, 1, 8, 2),
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        60.5,
    ),
    (LLAMA, (16, 16384, 1, 4, 2), {"context_parallel_size": 2}, 71.4),
    (LLAMA, (32, 8192, 2, 8, 2), FULL, 99.5),
    (QWEN, (8, 4096, 2, 8, 2), {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, 59.8),
    (QWEN, (4, 4096, 4, 16, 2), {}, 47.6),
]


@pytest.mark.parametrize(("recipe", "sizes", "settings", "gib"), MEASURED)
def test_estimate_is_within_a_tenth_of_what_was_measured(
    recipe: Recipe, sizes: tuple[int, ...], settings: dict[str, Any], gib: float
) -> None:
    layers, sequence, micro_batch, global_batch, gpus = sizes
    made = recipe(
        num_layers=layers, seq_length=sequence, micro_batch_size=micro_batch, global_batch_size=global_batch
    )
    made.mixed_precision = mixed_precision(settings.get("precision", "bf16_mixed"))
    layout = {**ONE_COPY, **{name: value for name, value in settings.items() if name != "precision"}}
    for name, value in layout.items():
        setattr(made.model, name, value)
    made.model.sequence_parallel = made.model.tensor_model_parallel_size > 1
    made.validate(gpus)
    assert estimate_memory(made, gpus).total / 2**30 == pytest.approx(gib, rel=0.1)
