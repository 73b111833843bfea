from typing import Any

import pytest

from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider


def provider(**values: Any) -> GPTModelProvider:
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    experts = {"num_moe_experts": 8, "moe_ffn_hidden_size": 24}
    return GPTModelProvider(
        **{**sizes, "vocab_size": 100, "max_position_embeddings": 64, **experts, **values}
    )


TENSOR = {"tensor_model_parallel_size": 2}
EXPERT = {"expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    "values",
    [
        {},
        EXPERT,
        TENSOR,
        {**TENSOR, **EXPERT},
        {**TENSOR, **EXPERT, "expert_tensor_parallel_size": 1, "add_bias_linear": True},
        {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"},
        {"moe_layer_freq": [0, 1]},
    ],
)
def test_what_megatron_can_train_is_allowed(values: dict[str, Any]) -> None:
    provider(**values).finalize()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_moe_experts": None, **EXPERT}, "without experts"),
        ({"expert_model_parallel_size": 3}, "num_moe_experts 8 is not divisible"),
        ({**TENSOR, "expert_tensor_parallel_size": 1}, "trains wrongly"),
        ({"expert_tensor_parallel_size": 2}, "trains wrongly"),
        ({**TENSOR, **EXPERT, "add_bias_linear": True}, "biases"),
        ({**TENSOR, "moe_ffn_hidden_size": 25}, "moe_ffn_hidden_size 25"),
        ({**TENSOR, "moe_shared_expert_intermediate_size": 25}, "moe_shared_expert_intermediate_size 25"),
        ({"moe_router_topk": 9}, "moe_router_topk is 9"),
        ({"moe_router_topk": 1}, "moe_router_pre_softmax"),
        ({"moe_layer_freq": [1]}, "moe_layer_freq"),
        ({"moe_layer_freq": [1, 2]}, "moe_layer_freq"),
    ],
)
def test_what_megatron_cannot_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        provider(**values).finalize()


def test_experts_take_their_ranks_from_data_parallelism() -> None:
    assert provider(**EXPERT, pipeline_model_parallel_size=2).expert_ranks == 4
    assert provider(**TENSOR, **EXPERT).expert_ranks == 4
    assert provider(**TENSOR, **EXPERT, expert_tensor_parallel_size=1).expert_ranks == 2
