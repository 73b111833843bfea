"""In which precision a run computes: the section `mixed_precision` of a config, and its named recipes."""

import dataclasses
from dataclasses import dataclass

from bridge.errors import ConfigError

FP8_FORMATS = ("e4m3", "hybrid")
# the lowest compute capability of a GPU that has what the recipe computes with
FP8_RECIPES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
NAMES = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass
class MixedPrecisionConfig:
    """16-bit parameters with fp32 master weights, matrix products in FP8 if wanted, or fp32 throughout."""

    bf16: bool = True
    fp16: bool = False
    grad_reduce_in_fp32: bool = True
    # fp16 alone: the loss is multiplied by this, or by a factor that follows the gradients
    loss_scale: float | None = None
    initial_loss_scale: float = 2.0**32
    min_loss_scale: float = 1.0
    loss_scale_window: float = 1000
    hysteresis: int = 2
    # "hybrid": e4m3 forward and e5m2 backward
    fp8: str | None = None
    fp8_recipe: str = "delayed"
    # weights kept in FP8, and gathered in it from the ranks of a distributed optimizer
    fp8_param: bool = False
    fp8_margin: int = 0
    fp8_amax_history_len: int = 1
    fp8_amax_compute_algo: str = "most_recent"
    fp8_wgrad: bool = True
    fp8_dot_product_attention: bool = False
    fp8_multi_head_attention: bool = False
    tp_only_amax_red: bool = False
    first_last_layers_bf16: bool = False
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1

    @property
    def params_dtype(self) -> str:
        """The dtype that weights are computed with and saved in."""
        return next((dtype for name, dtype in NAMES.items() if getattr(self, name)), "float32")

    def check(self) -> None:
        """Refuse what contradicts itself, by ConfigError."""
        if self.bf16 and self.fp16:
            raise ConfigError("mixed_precision.bf16 and mixed_precision.fp16 are both true: choose one")
        if self.fp8 is not None:
            self._check_fp8()
        elif self.fp8_param:
            raise ConfigError("mixed_precision.fp8_param keeps weights in FP8: give mixed_precision.fp8 too")

    def _check_fp8(self) -> None:
        for name, allowed in (("fp8", FP8_FORMATS), ("fp8_recipe", tuple(FP8_RECIPES))):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ConfigError(f"mixed_precision.{name} is {value!r}: allowed are {', '.join(allowed)}")
        if not self.bf16:
            raise ConfigError("mixed_precision.fp8 needs mixed_precision.bf16: what is not FP8 is bf16")
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise ConfigError(
                "mixed_precision.first_last_layers_bf16 does not go with delayed scaling: choose fp8_recipe"
                " tensorwise or blockwise"
            )
        if self.fp8_recipe == "mxfp8" and self.fp8_param:
            raise ConfigError(
                "mixed_precision.fp8_param is not supported with fp8_recipe mxfp8: set it to false"
            )

    def check_device(self, compute_capability: tuple[int, int] | None) -> None:
        """Refuse a precision that the GPUs do not have; None means that there is none."""
        if compute_capability is None:
            if self.fp16 or self.fp8:
                raise ConfigError(
                    f"mixed_precision asks for {'FP8' if self.fp8 else 'fp16'}, which needs a GPU, and"
                    " there is none: choose the recipe bf16_mixed or fp32"
                )
        elif self.fp8 and compute_capability < FP8_RECIPES[self.fp8_recipe]:
            raise ConfigError(
                f"mixed_precision.fp8_recipe {self.fp8_recipe} needs a GPU of compute capability"
                f" {_version(FP8_RECIPES[self.fp8_recipe])}, this one has {_version(compute_capability)}:"
                f" choose {_possible(compute_capability)}"
            )


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _possible(capability: tuple[int, int]) -> str:
    recipes = [name for name, lowest in FP8_RECIPES.items() if capability >= lowest]
    return " or ".join(recipes) or "the recipe bf16_mixed"


BF16 = MixedPrecisionConfig()
FP8 = dataclasses.replace(BF16, fp8="hybrid")
RECIPES = {
    "fp32": dataclasses.replace(BF16, bf16=False),
    "bf16_mixed": BF16,
    "fp16_mixed": dataclasses.replace(BF16, bf16=False, fp16=True),
    "bf16_with_fp8_delayed_scaling_mixed": dataclasses.replace(
        FP8, fp8_recipe="delayed", fp8_amax_history_len=1024, fp8_amax_compute_algo="max"
    ),
    # as published for long runs: a few layers at either end stay in bf16
    "bf16_with_fp8_current_scaling_mixed": dataclasses.replace(
        FP8, fp8_recipe="tensorwise", first_last_layers_bf16=True
    ),
    "bf16_with_fp8_blockwise_mixed": dataclasses.replace(FP8, fp8_recipe="blockwise"),
    "bf16_with_mxfp8_mixed": dataclasses.replace(FP8, fp8="e4m3", fp8_recipe="mxfp8"),
}


def mixed_precision(name: str) -> MixedPrecisionConfig:
    """Return a new section filled by a recipe."""
    if name not in RECIPES:
        raise ConfigError(f"no mixed_precision recipe is called {name!r}: allowed are {', '.join(RECIPES)}")
    return dataclasses.replace(RECIPES[name])
