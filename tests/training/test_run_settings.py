import pytest

from bridge.errors import ConfigError
from bridge.provider import GPTModelProvider
from recipes.llama import llama32_1b_pretrain_config
from training.run_settings import FUSIONS, run_settings


def provider(**values) -> GPTModelProvider:
    model = llama32_1b_pretrain_config().model
    for name, value in values.items():
        setattr(model, name, value)
    return model


def test_nothing_is_fused_without_transformer_engine():
    assert run_settings(provider(), transformer_engine=False) == dict.fromkeys(FUSIONS, False)


def test_everything_is_fused_with_it():
    off = {name for name, value in run_settings(provider(), transformer_engine=True).items() if not value}
    assert off == {"bias_activation_fusion"}  # the engine's activation does its work


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"use_te_activation_func": False}, "bias_activation_fusion", True),
        ({"bias_activation_fusion": True}, "use_te_activation_func", False),
        ({"num_moe_experts": 8}, "use_te_activation_func", False),
        ({"num_moe_experts": 8}, "bias_activation_fusion", True),
        ({"activation_func_clamp_value": 7.0}, "use_te_activation_func", False),
        ({"activation_func_clamp_value": 7.0, "num_moe_experts": 8}, "bias_activation_fusion", False),
        ({"multi_latent_attention": True}, "apply_rope_fusion", False),
        ({"final_logit_softcapping": 30.0}, "cross_entropy_loss_fusion", False),
        ({"cross_entropy_loss_fusion": False}, "cross_entropy_loss_fusion", False),
    ],
)
def test_the_model_and_the_user_decide(values, name, expected):
    assert run_settings(provider(**values), transformer_engine=True)[name] is expected


@pytest.mark.parametrize(
    "values",
    [
        {"apply_rope_fusion": True},
        {"cpu_offloading": True, "cpu_offloading_num_layers": 2},
    ],
)
def test_what_cannot_be_is_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        run_settings(provider(**values), transformer_engine=False)
