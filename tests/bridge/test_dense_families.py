"""Released dense models, what would be converted wrongly, and that tests see what is special to a family."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILY_SETTINGS
from released_dense import RELEASED
from transformers import AutoConfig, AutoModelForCausalLM

from bridge.errors import UnsupportedModelError
from bridge.families import family_of, plan_weights, provider_of

Checkpoints = Callable[..., Path]


def by_transformers(config: dict[str, Any]) -> Any:
    """Return the config as transformers understands it, without the reference to code of the model's own."""
    config = copy.deepcopy(config)  # transformers writes into the rope parameters that it is given
    return AutoConfig.for_model(**{key: value for key, value in config.items() if key != "auto_map"})


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_read_and_kept(name: str) -> None:
    config = RELEASED[name]
    provider = provider_of(config)
    assert provider.params_dtype == config.get("dtype", config.get("torch_dtype"))
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    assert family_of(config).hf_config(provider) == kept


@pytest.mark.parametrize("name", RELEASED)
def test_both_spellings_of_a_released_config_mean_the_same(name: str) -> None:
    """transformers reads the released one and writes the present one, defaults included."""
    present = by_transformers(RELEASED[name]).to_dict()
    assert "rope_theta" not in present
    released, rewritten = (provider_of(each).to_dict() for each in (RELEASED[name], present))
    assert rewritten | {"hf_config": None} == released | {"hf_config": None}


@pytest.mark.parametrize("name", RELEASED)
def test_a_config_written_from_the_description_alone_means_the_same(name: str) -> None:
    config = RELEASED[name]
    provider = provider_of(config)
    provider.hf_config = {}
    written = provider_of(family_of(config).hf_config(provider))
    assert written.to_dict() | {"hf_config": {}} == provider.to_dict()


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_has_as_many_weights_as_in_transformers(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(by_transformers(RELEASED[name]))
    plan = plan_weights(provider_of(RELEASED[name]))
    assert sum(math.prod(shape) for shape in plan.hf_shapes.values()) == model.num_parameters()


# in billions, as the model cards have them
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("SmolLM2-135M-Instruct", 0.1345),
        ("Qwen2.5-7B-Instruct-1M", 7.61),
        ("gemma-2b", 2.51),
        ("gemma-7b", 8.54),
        ("gemma-2-2b", 2.61),
        ("gemma-2-27b", 27.2),
        ("gemma-3-1b-it", 1.0),
        ("gemma-3-270m", 0.268),
        ("Minitron-4B-Base", 4.19),
        ("Minitron-8B-Base", 8.27),
        ("Nemotron-4-340B-Base", 341),
        ("Phi-3-mini-4k-instruct", 3.82),
        ("phi-4", 14.7),
        ("Phi-4-mini-instruct", 3.84),
        ("OLMo-2-1124-7B", 7.3),
        ("OLMo-2-0325-32B", 32.2),
    ],
)
def test_released_models_have_the_parameters_that_their_cards_say(name: str, billions: float) -> None:
    plan = plan_weights(provider_of(RELEASED[name]))
    assert plan.num_parameters / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("SmolLM2-135M-Instruct", {"rope_interleaved": True}, "rope_interleaved"),
        ("gemma-2b", {"hidden_act": "silu"}, "hidden_act"),
        ("gemma-2b", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma-2-27b", {"sliding_window_size": 2048}, "sliding_window_size"),
        ("gemma-2-27b", {"sliding_window": None}, "sliding_window"),
        ("gemma-2-27b", {"layer_types": ["full_attention"]}, "1 layer_types for 46 layers"),
        ("gemma-2-27b", {"layer_types": ["chunked_attention"] * 46}, "chunked_attention"),
        ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma-3-1b-it", {"rope_parameters": {"rope_type": "default"}}, "by layer type"),
        ("gemma-3-1b-it", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "yarn"),
        ("Minitron-4B-Base", {"hidden_act": "silu"}, "hidden_act"),
        ("Minitron-4B-Base", {"mlp_bias": True}, "mlp_bias"),
        ("Minitron-8B-Base", {"kv_channels": 64}, "kv_channels 64: by its other keys this is 128"),
        ("Nemotron-4-4B", {"kv_channels": 64}, "kv_channels 64"),
        ("Nemotron-4-4B", {"rope_percentage": 1.0}, "rope_percentage"),
        ("Nemotron-4-4B", {"rope_percent": 1.0}, "rope_percent 1.0: by its other keys this is 0.5"),
        ("phi-4", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("phi-4", {"resid_pdrop": 0.1}, "resid_pdrop"),
        ("phi-4", {"lm_head_bias": True}, "lm_head_bias"),
        ("phi-4", {"full_attn_mod": 2}, "full_attn_mod"),
        ("phi-4", {"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map"),
        ("OLMo-2-1124-7B", {"attention_bias": True}, "attention_bias"),
        ("OLMo-2-1124-7B", {"clip_qkv": 8.0}, "clip_qkv"),
        ("Ministral-3-8B", {"rope_parameters": {"rope_type": "default"}}, "llama_4_scaling_beta"),
    ],
)
def test_what_would_be_converted_wrongly_is_refused_by_name(
    name: str, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        provider_of({**RELEASED[name], **change})


def test_a_repeated_key_goes_with_what_it_repeats() -> None:
    """kv_channels of another value would be a contradiction to read again."""
    config = RELEASED["Nemotron-4-4B"] | {"rope_percent": 0.5}
    provider = provider_of(config)
    provider.kv_channels = 64
    changed = {key: value for key, value in config.items() if key != "kv_channels"} | {"head_dim": 64}
    assert family_of(config).hf_config(provider) == changed


def test_a_query_scale_that_no_key_can_say_is_refused() -> None:
    provider = provider_of(RELEASED["gemma-2-27b"])
    assert provider.softmax_scale == pytest.approx(1 / 12)
    provider.softmax_scale = 0.1234
    with pytest.raises(UnsupportedModelError, match="query_pre_attn_scalar"):
        family_of(RELEASED["gemma-2-27b"]).hf_config(provider)


def rope_of(family: str, **changes: Any) -> dict[str, Any]:
    return {"rope_parameters": FAMILY_SETTINGS[family]["rope_parameters"] | changes}


GEMMA3_ROPES = FAMILY_SETTINGS["gemma3_text"]["rope_parameters"]

# What the small models of FAMILY_SETTINGS would be without one of the things that are special to them.
SPECIAL: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 16}),
    ("gemma2", {"sliding_window": 512}),
    ("gemma3_text", {"query_pre_attn_scalar": 16}),
    ("gemma3_text", {"sliding_window": 512}),
    (
        "gemma3_text",
        {"layer_types": [*4 * ["sliding_attention"], "full_attention", *3 * ["sliding_attention"]]},
    ),
    ("gemma3_text", {"rope_parameters": dict.fromkeys(GEMMA3_ROPES, GEMMA3_ROPES["full_attention"])}),
    ("gemma3_text", {"rope_parameters": dict.fromkeys(GEMMA3_ROPES, GEMMA3_ROPES["sliding_attention"])}),
    ("nemotron", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
    ("phi3", rope_of("phi3", short_factor=[1.0] * 3)),
    ("phi3", rope_of("phi3", long_factor=[1.0] * 3)),
    ("phi3", rope_of("phi3", attention_factor=1.0)),
    ("phi3", {"sliding_window": None}),
    ("ministral3", rope_of("ministral3", llama_4_scaling_beta=0.0)),
    ("ministral3", rope_of("ministral3", attention_factor=1.0)),
    ("ministral3", rope_of("ministral3", beta_fast=32.0)),
    ("ministral3", rope_of("ministral3", factor=1.0, attention_factor=1.2)),
    ("gpt_oss", {"sliding_window": 512}),
    ("gpt_oss", rope_of("gpt_oss", truncate=True)),
]


@pytest.mark.parametrize(("family", "change"), SPECIAL)
def test_logits_show_what_is_special_to_a_family(
    family: str, change: dict[str, Any], hf_checkpoint: Checkpoints
) -> None:
    """Far above the 1e-4 to which tests/bridge/test_layouts.py holds them."""
    folder = hf_checkpoint(family)
    config = AutoConfig.from_pretrained(folder)
    changed = by_transformers({**config.to_dict(), **change})
    # a sequence longer than longrope's short ones, and a short one
    differences = [
        (logits(folder, config, length) - logits(folder, changed, length)).abs().max().item()
        for length in (40, 20)
    ]
    assert max(differences) > 5e-3


def logits(folder: Path, config: Any, length: int) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(2, 2 + length)[None]).logits
