"""The configs of DeepSeek's and Moonshot's releases, written down from memory, and what they mean."""

from typing import Any

import pytest

from bridge.errors import ConfigError, UnsupportedModelError
from bridge.families import family_of, plan_weights, provider_of
from bridge.latent_attention import rope_settings

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}

V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}

MOONLIGHT: dict[str, Any] = {
    **{k: v for k, v in V3.items() if k not in ("quantization_config", "rope_scaling")},
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "transformers_version": "4.48.3",
    "vocab_size": 163840,
}

V2: dict[str, Any] = {
    **{k: v for k, v in V3.items() if k not in ("quantization_config", "num_nextn_predict_layers")},
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "vocab_size": 102400,
}

V2_LITE: dict[str, Any] = {
    **V2,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}

RELEASED = {"V3": V3, "Moonlight": MOONLIGHT, "V2": V2, "V2-Lite": V2_LITE}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_come_back(name: str) -> None:
    config = RELEASED[name]
    written = family_of(config).hf_config(provider_of(config))
    left_out = ("quantization_config", "auto_map")
    assert written == {key: value for key, value in config.items() if key not in left_out}


def test_code_of_another_model_is_refused() -> None:
    provider_of({**V3, "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}})
    with pytest.raises(UnsupportedModelError, match="modeling_own"):
        provider_of({**V3, "auto_map": {"AutoModelForCausalLM": "modeling_own.DeepseekV3ForCausalLM"}})


# in billions, as the model cards have them; V3's 671 leave out the prediction layer
@pytest.mark.parametrize(
    ("name", "billions"), [("V3", 671 + 11.5), ("Moonlight", 16.0), ("V2", 235.7), ("V2-Lite", 15.7)]
)
def test_released_models_have_the_parameters_that_their_cards_say(name: str, billions: float) -> None:
    plan = plan_weights(provider_of(RELEASED[name]))
    assert plan.num_parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_prediction_layer_of_v3_is_the_62nd_in_its_files() -> None:
    plan = plan_weights(provider_of(V3))
    blocks = {block.key: block.hf for block in plan.blocks if block.key.startswith("mtp.")}
    assert blocks["mtp.layers.0.eh_proj.weight"] == "model.layers.61.eh_proj.weight"
    assert blocks["mtp.layers.0.transformer_layer.mlp.router.weight"] == "model.layers.61.mlp.gate.weight"
    assert "mtp.layers.0.transformer_layer.mlp.linear_fc2.weight" not in blocks
    assert plan.copies == {
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
    }


def test_rope_of_released_models_reaches_megatron() -> None:
    assert rope_settings(provider_of(V2)) == {
        "rope_type": "yarn",
        "rotary_scaling_factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
    assert rope_settings(provider_of(MOONLIGHT))["rope_type"] == "rope"


@pytest.mark.parametrize(
    ("source", "change", "named"),
    [
        (V3, {"num_key_value_heads": 64}, "num_key_value_heads"),
        (V3, {"qk_head_dim": 128}, "qk_head_dim"),
        (V3, {"norm_topk_prob": False}, "norm_topk_prob"),
        (V3, {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        (V3, {"scoring_func": "softmax"}, "scoring_func"),
        (V3, {"topk_method": "greedy"}, "topk_method"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (V3, {"rope_interleave": False}, "rope_interleave"),
        (V3, {"first_k_dense_replace": 61}, "first_k_dense_replace"),
        (V3, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func"),
    ],
)
def test_what_would_be_converted_wrongly_is_refused(
    source: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        provider_of(source | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"mscale_all_dim": None}, "mscale"), ({"truncate": False}, "truncate"), ({"mscale": 0}, "mscale")],
)
def test_a_rope_that_megatron_would_compute_otherwise_is_refused(change: dict[str, Any], named: str) -> None:
    provider = provider_of(V3 | {"rope_scaling": V3["rope_scaling"] | change})
    with pytest.raises(ConfigError, match=named):
        rope_settings(provider)
