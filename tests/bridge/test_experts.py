"""Released models with experts, and what would be converted wrongly."""

import math
from typing import Any

import pytest
import torch
from released_configs import RELEASED
from transformers import AutoConfig, AutoModelForCausalLM

from bridge.errors import UnsupportedModelError
from bridge.families import family_of, plan_weights, provider_of

BY_FAMILY = {config["model_type"]: config for config in RELEASED.values()}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_read_and_kept(name: str) -> None:
    config = RELEASED[name]
    provider = provider_of(config)
    assert provider.params_dtype == "bfloat16"
    written = family_of(config).hf_config(provider)
    assert written == {k: v for k, v in config.items() if k != "quantization_config"} | (
        {} if "torch_dtype" in config else {"dtype": "bfloat16"}
    )


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_has_as_many_weights_as_in_transformers(name: str) -> None:
    # transformers has no prediction layers
    config = {**RELEASED[name], "num_nextn_predict_layers": 0}
    if "num_nextn_predict_layers" not in RELEASED[name]:
        del config["num_nextn_predict_layers"]
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    plan = plan_weights(provider_of(config))
    assert sum(math.prod(shape) for shape in plan.hf_shapes.values()) == sum(
        tensor.numel() for tensor in model.state_dict().values()
    )


def test_prediction_layers_follow_those_of_the_decoder() -> None:
    plan = plan_weights(provider_of(RELEASED["GLM-4.5-Air"]))
    layer = {name for name in plan.hf_shapes if name.startswith("model.layers.46.")}
    assert "model.layers.46.mlp.experts.127.up_proj.weight" in layer
    assert plan.hf_shapes["model.layers.46.eh_proj.weight"] == (4096, 8192)
    assert plan.tied["model.layers.46.shared_head.head.weight"] == "lm_head.weight"


@pytest.mark.parametrize(
    ("model_type", "change", "named"),
    [
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ("qwen3_moe", {"mlp_only_layers": list(range(48))}, "no layer has experts"),
        ("qwen3_moe", {"qkv_bias": True}, "qkv_bias"),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 768}, "shared_expert_intermediate_size"),
        ("qwen3_moe", {"num_local_experts": 64}, "num_local_experts"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe", {"attention_bias": True}, "attention_bias"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias"),
        ("gpt_oss", {"experts_per_token": 2}, "experts_per_token"),
    ],
)
def test_what_would_be_converted_wrongly_is_refused_by_name(
    model_type: str, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        provider_of({**BY_FAMILY[model_type], **change})


def test_layers_without_experts_are_those_of_transformers() -> None:
    config = {**BY_FAMILY["qwen3_moe"], "num_hidden_layers": 6, "decoder_sparse_step": 2}
    config["mlp_only_layers"] = [3]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    expected = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    provider = provider_of(config)
    assert provider.moe_layers == expected
    provider.hf_config = {}
    written = family_of(config).hf_config(provider)
    assert (written["decoder_sparse_step"], written["mlp_only_layers"]) == (2, [3])
