import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FAMILY_SETTINGS, SIZES, as_stored, given
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from bridge.config_rules import REQUIRED, Constant, Dtype, Field, Requires
from bridge.errors import InputError, UnsupportedModelError
from bridge.families import families, family_named, family_of, plan_weights, provider_of
from bridge.family_checks import families_with
from bridge.hf_checkpoint import read_config
from bridge.run_keys import GENERATION_KEYS, WITHOUT_MEANING

# As the hub has it for Llama 3.2 1B, cut to a small size: the spelling before transformers 5.
LEGACY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 160,
}


# Keys that follow from others: to change one alone would be a contradiction.
LATENT_HEADS = {"num_key_value_heads", "qk_head_dim", "head_dim"}
DERIVED = {"deepseek_v2": LATENT_HEADS, "deepseek_v3": LATENT_HEADS}

LATENT_CHANGES = {
    "q_lora_rank": 40,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 24,
    "v_head_dim": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 80,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "n_group": 8,
    "topk_group": 1,
    "routed_scaling_factor": 2.0,
}

# Keys of a family's own, each with another value than the small config has.
FAMILY_CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**LATENT_CHANGES, "topk_method": "greedy"},
    "deepseek_v3": {**LATENT_CHANGES, "num_nextn_predict_layers": 1},
    "gemma2": {
        "query_pre_attn_scalar": 36,
        "sliding_window": 20,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 36,
        "sliding_window": 20,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
            "full_attention": {"rope_type": "default", "rope_theta": 5.0},
        },
    },
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 80,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.0,
        "attention_bias": False,
        "use_qk_norm": False,
        "num_nextn_predict_layers": 1,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.5,
        "swiglu_limit": 5.0,
        "sliding_window": 20,
    },
    "ministral3": {
        "sliding_window": 20,
        "rope_parameters": FAMILY_SETTINGS["ministral3"]["rope_parameters"] | {"llama_4_scaling_beta": 0.25},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.5},
    "nemotron": {
        "norm_eps": 3e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.25},
    },
    "olmoe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.5,
    },
    "phi3": {
        "sliding_window": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 1.0},
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 80,
        "shared_expert_intermediate_size": 80,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "router_aux_loss_coef": 0.5,
    },
    "qwen3_moe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 80,
        "norm_topk_prob": False,
        "mlp_only_layers": [0, 1],
        "router_aux_loss_coef": 0.5,
    },
}


def small_config(model_type: str, **values: Any) -> dict[str, Any]:
    settings = {**SIZES, **FAMILY_SETTINGS.get(model_type, {}), **values}
    config = AutoConfig.for_model(model_type, **given(settings))
    return {**config.to_diff_dict(), "dtype": "bfloat16"}


@pytest.mark.parametrize("model_type", families_with("config"))
def test_config_survives_the_round_trip(model_type: str, hf_checkpoint: Callable[..., Path]) -> None:
    config = read_config(hf_checkpoint(model_type))
    back = family_of(config).hf_config(provider_of(config))
    assert list(back.items()) == list(config.items())


@pytest.mark.parametrize("model_type", families())
def test_written_config_means_the_same_to_transformers(model_type: str) -> None:
    """Without a source to copy from, every key that matters must come from the provider."""
    # names of the architecture and of a token, which a provider does not know
    carried = {"architectures": None, "pad_token_id": None}
    config = small_config(model_type)
    provider = provider_of(config)
    provider.hf_config = {}
    written = AutoConfig.for_model(**family_named(model_type).hf_config(provider))
    assert written.to_diff_dict() | carried == AutoConfig.for_model(**config).to_diff_dict() | carried


@pytest.mark.parametrize("model_type", families_with("config"))
def test_every_meaningful_key_reaches_the_provider(model_type: str) -> None:
    """Change one key at a time: the provider must change, and the change must come back."""
    config = small_config(model_type)
    changes = {
        "num_hidden_layers": 6,
        "hidden_size": 72,
        "intermediate_size": 144,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 161,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 3e-5,
        "initializer_range": 0.5,
        "tie_word_embeddings": not config["tie_word_embeddings"],
        "attention_dropout": 0.25,
        "dtype": "float32",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0},
    }
    changes |= FAMILY_CHANGES.get(model_type, {})
    derived = {"layer_types", *DERIVED.get(model_type, ())}
    if model_type == "nemotron":
        derived.add("rms_norm_eps")  # which it spells norm_eps
    config = {key: value for key, value in config.items() if key not in derived}
    before = provider_of(config).to_dict()
    for key in changes.keys() - derived:
        value = changes[key]
        changed = config | {key: value}
        provider = provider_of(changed)
        assert {**provider.to_dict(), "hf_config": None} != {**before, "hf_config": None}, key
        assert family_named(model_type).hf_config(provider)[key] == value


@pytest.mark.parametrize("model_type", families())
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    defaults = AutoConfig.for_model(model_type).to_dict()
    for rule in family_named(model_type).config:
        if isinstance(rule, Field) and rule.default is not REQUIRED and not str(rule.default).startswith("="):
            assert rule.default == defaults[rule.key], rule.key
        if isinstance(rule, Requires) and rule.key in defaults:
            assert rule.allowed[0] == defaults[rule.key], rule.key
    bare = {
        k: v for k, v in small_config(model_type).items() if k not in ("rope_parameters", "sliding_window")
    }
    filled = AutoConfig.for_model(**bare)
    provider = provider_of(bare)
    rope = filled.rope_parameters
    assert provider.rotary_base == rope.get("full_attention", rope)["rope_theta"]
    if provider.rope_local_parameters is not None:
        assert provider.rope_local_parameters == rope["sliding_attention"]
    if model_type == "mistral":
        assert provider.window_size == (filled.sliding_window - 1, 0)


def test_old_spelling_is_read_and_kept() -> None:
    provider = provider_of(LEGACY_LLAMA)
    assert provider.rope_parameters == {
        **LEGACY_LLAMA["rope_scaling"],
        "rope_type": "llama3",
        "rope_theta": 500000.0,
    }
    assert provider.params_dtype == "bfloat16"
    assert family_named("llama").hf_config(provider) == LEGACY_LLAMA


def test_settings_of_generation_are_those_that_transformers_drops() -> None:
    """They travel; a key among them that the model's class reads would be one of its own."""
    assert set(GENERATION_KEYS) <= GenerationConfig._get_default_generation_params().keys()
    config = LEGACY_LLAMA | dict.fromkeys(WITHOUT_MEANING.keys, None)
    provider = provider_of(config)
    assert family_named("llama").hf_config(provider) == config
    assert provider.to_dict() | {"hf_config": LEGACY_LLAMA} == provider_of(LEGACY_LLAMA).to_dict()


def test_a_changed_field_is_exported_with_its_new_value() -> None:
    provider = provider_of(LEGACY_LLAMA)
    provider.params_dtype, provider.rope_parameters["factor"] = "float32", 8.0
    config = family_named("llama").hf_config(provider)
    assert config["torch_dtype"] == "float32"
    assert config["rope_parameters"]["factor"] == 8.0
    assert "rope_scaling" not in config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "lama"}, "'lama'"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "kimi_k2"}, "write that as model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "ramp": 1}}, "ramp"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.9}},
            "write .* attention_factor",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_would_be_converted_wrongly_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {k: v for k, v in {**LEGACY_LLAMA, **change}.items() if v is not None}
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        provider_of(config)
    assert "\n" not in str(caught.value)


LINEAR = {"rope_type": "linear", "factor": 3.0}


@pytest.mark.parametrize("model_type", families())
def test_two_spellings_of_the_rope_must_mean_the_same(model_type: str) -> None:
    """transformers takes rope_scaling where rope_parameters are there as well, and says nothing."""
    config = small_config(model_type)
    with pytest.raises(UnsupportedModelError, match=r"rope_scaling .* but rope_p|type 'linear'"):
        provider_of({**config, "rope_scaling": LINEAR})
    given = config.get("rope_parameters", {})
    same = {"rope_theta": 10000.0, "rope_type": "default", **given.get("full_attention", given)}
    assert (
        provider_of({**config, "rope_scaling": same}).rope_parameters == provider_of(config).rope_parameters
    )


@pytest.mark.parametrize("present", [None, {}])
@pytest.mark.parametrize("former", [None, {}, LINEAR])
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_an_empty_rope_is_read_as_transformers_reads_it(model_type: str, former: Any, present: Any) -> None:
    config = {**small_config(model_type), "rope_scaling": former, "rope_parameters": present}
    provider, judge = provider_of(config), AutoConfig.for_model(**copy.deepcopy(config)).rope_parameters
    assert provider.rope_parameters == judge


ODD_VALUES = (None, 0, -1, 1.5, math.inf, True, "x", "12", [], [0], ["x", 3], [[1]], {}, {"a": 1})


@pytest.mark.parametrize("model_type", families())
def test_a_malformed_value_is_an_error_of_one_line(model_type: str) -> None:
    """Every value of another kind is read or refused: no rule stumbles over one."""
    config = small_config(model_type)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    nested = [(key, name) for key in config if isinstance(config[key], dict) for name in config[key]]
    changed = [{**config, key: value} for key in config for value in ODD_VALUES]
    changed += [{**config, key: {**config[key], name: value}} for key, name in nested for value in ODD_VALUES]
    assert all("\n" not in refusal(case) for case in changed)


def refusal(config: dict[str, Any]) -> str:
    try:
        provider_of(config)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps "1e-5": expected float'),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings "yes": expected bool'),
        ({"max_position_embeddings": "12"}, 'max_position_embeddings "12": expected int'),
        ({"hidden_size": 64.0}, "hidden_size 64.0: expected int"),
        ({"num_key_value_heads": "4"}, 'num_key_value_heads "4": expected int or null'),
        ({"num_attention_heads": 0}, "num_attention_heads 0: expected an int of 1 or more"),
        ({"head_dim": True}, "head_dim true: expected an int of 1 or more or null"),
        ({"model_type": ["llama"]}, 'model_type ["llama"]: expected str'),
        ({"rope_scaling": []}, "rope_scaling []: expected an object or null"),
        ({"rope_theta": "1e4"}, 'rope_theta "1e4": expected float or null'),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'rope_parameters.factor "2": expected float'),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(f"config.json has {message}")):
        provider_of({**LEGACY_LLAMA, **change})


def test_sliding_layers_of_qwen_are_refused() -> None:
    config = small_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(UnsupportedModelError, match=r"use_sliding_window|layer_types"):
        provider_of(config)


@pytest.mark.parametrize("model_type", families())
def test_a_family_cannot_write_another_familys_model(model_type: str) -> None:
    for rule in family_named(model_type).config:
        if isinstance(rule, Constant):
            provider = provider_of(small_config(model_type))
            setattr(provider, rule.field, not rule.value)
            with pytest.raises(UnsupportedModelError, match=rule.field):
                family_named(model_type).hf_config(provider)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", families())
def test_plan_covers_exactly_the_weights_of_transformers(model_type: str, tied: bool) -> None:
    config = small_config(model_type, tie_word_embeddings=tied)
    plan = plan_weights(provider_of(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    stored = as_stored(model, model.state_dict())
    weights = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert plan.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    for name in plan.tied:
        weights.pop(name)
    assert plan.hf_shapes == weights


@pytest.mark.parametrize("model_type", families())
def test_blocks_tile_both_ends_without_gap_or_overlap(model_type: str) -> None:
    plan = plan_weights(provider_of(small_config(model_type)))
    hf, megatron = Counter[tuple[str, int]](), Counter[tuple[Any, ...]]()
    for block in plan.blocks:
        hf.update((block.hf, block.hf_row + row * block.hf_step) for row in range(block.rows))
        megatron.update((block.key, *block.lead, block.megatron_row + row) for row in range(block.rows))
    assert set(hf.values()) == set(megatron.values()) == {1}
    leads = {block.key: len(block.lead) for block in plan.blocks}
    num_columns = {block.hf: math.prod(plan.columns(block.key, block.lead)) for block in plan.blocks}
    assert hf.keys() == {
        (name, row)
        for name, shape in plan.hf_shapes.items()
        for row in range(math.prod(shape) // num_columns[name])
    }
    num_rows = sum(math.prod(shape[: leads[key] + 1]) for key, shape in plan.megatron_shapes.items())
    assert len(megatron) == num_rows


def test_buffers_of_old_checkpoints_are_listed() -> None:
    plan = plan_weights(provider_of(LEGACY_LLAMA))
    assert plan.is_buffer("model.layers.12.self_attn.rotary_emb.inv_freq")
    assert not plan.is_buffer("model.layers.12.self_attn.rotary_emb.weight")
    assert not plan.is_buffer("model.layers.x.self_attn.rotary_emb.inv_freq")


def test_dtype_follows_the_spelling_of_the_source() -> None:
    provider = provider_of(LEGACY_LLAMA)
    assert Dtype().write(provider) == {"torch_dtype": "bfloat16"}
    assert json.loads(json.dumps(provider.to_dict())) == provider.to_dict()
