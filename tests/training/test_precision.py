import pytest

from bridge.errors import ConfigError
from training.config import ConfigContainer
from training.overrides import apply_overrides
from training.precision import RECIPES, MixedPrecisionConfig, mixed_precision

H100, A100, B200 = (9, 0), (8, 0), (10, 0)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_agree_with_themselves(name):
    section = mixed_precision(name)
    section.check()
    assert section.params_dtype == {"fp32": "float32", "fp16_mixed": "float16"}.get(name, "bfloat16")


@pytest.mark.parametrize("override", [{"mixed_precision": "fp32"}, ["mixed_precision=fp32"]])
def test_a_recipe_fills_the_section(override):
    config = apply_overrides(ConfigContainer(), override)
    assert config.mixed_precision == RECIPES["fp32"]
    assert config.mixed_precision is not RECIPES["fp32"]
    assert ConfigContainer.from_dict({"mixed_precision": "fp32"}).mixed_precision == RECIPES["fp32"]


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(ConfigError, match=r"no mixed_precision recipe is called 'fp4'.*bf16_mixed"):
        apply_overrides(ConfigContainer(), ["mixed_precision=fp4"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fp16": True}, "both true"),
        ({"fp8": "e5m2"}, "allowed are e4m3, hybrid"),
        ({"fp8": "hybrid", "fp8_recipe": "rowwise"}, "allowed are delayed, tensorwise"),
        ({"fp8": "hybrid", "bf16": False}, "needs mixed_precision.bf16"),
        ({"fp8_param": True}, "give mixed_precision.fp8 too"),
        ({"fp8": "hybrid", "first_last_layers_bf16": True}, "does not go with delayed scaling"),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_param": True}, "not supported with fp8_recipe mxfp8"),
    ],
)
def test_contradictions_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        MixedPrecisionConfig(**values).check()


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        ("bf16_with_fp8_delayed_scaling_mixed", None, "asks for FP8, which needs a GPU"),
        ("fp16_mixed", None, "asks for fp16, which needs a GPU"),
        ("bf16_with_fp8_delayed_scaling_mixed", A100, "8.9, this one has 8.0: choose the recipe bf16_mixed"),
        ("bf16_with_mxfp8_mixed", H100, "10.0, this one has 9.0: choose delayed or tensorwise or blockwise"),
    ],
)
def test_a_precision_that_the_device_lacks_is_refused(name, capability, message):
    with pytest.raises(ConfigError, match=message):
        mixed_precision(name).check_device(capability)


@pytest.mark.parametrize(
    ("name", "capability"),
    [("bf16_mixed", None), ("fp32", None), ("fp16_mixed", A100), ("bf16_with_mxfp8_mixed", B200)],
)
def test_what_the_device_has_passes(name, capability):
    mixed_precision(name).check_device(capability)
