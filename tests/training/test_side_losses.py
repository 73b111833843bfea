"""Losses beside the main one, where they are known: of a model without opinions on experts and tokens."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_hf_checkpoint

from bridge import distributed
from bridge.auto_bridge import AutoBridge
from bridge.provider import GPTModelProvider
from training.gpt_step import forward_step
from training.side_losses import clear, side_losses

TOKENS = torch.arange(24)[None] * 7 % 150


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    clear()
    yield
    distributed.finalize()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a dense layer, layers of experts and one prediction layer, which has experts as well."""
    folder = tmp_path_factory.mktemp("predicting")
    return make_hf_checkpoint(folder / "hf", "glm4_moe", dtype="float32", num_nextn_predict_layers=1)


def measured(source: Path, num_microbatches: int = 2, indifferent: bool = True, **settings: Any) -> Any:
    """Return the provider, and what micro-batches of one iteration come to."""
    bridge = AutoBridge.from_hf_pretrained(source)
    provider = bridge.to_megatron_provider()
    for name, value in settings.items():
        setattr(provider, name, value)
    [model] = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.load_hf_weights([model])
    if indifferent:
        for name, weight in model.named_parameters():
            if name.endswith("router.weight") or name.startswith("output_layer"):
                weight.data.zero_()
    batch = {"tokens": TOKENS, "labels": TOKENS.roll(-1, 1), "position_ids": torch.arange(24)[None]}
    batch["loss_mask"] = torch.ones(TOKENS.shape)
    for _ in range(num_microbatches):
        forward_step(iter([batch]), model)
    return provider, side_losses(provider, num_microbatches)


BALANCED = ("aux_loss", "load_balancing_loss"), ("seq_aux_loss", "seq_load_balancing_loss")


@pytest.mark.parametrize(("kind", "name"), [*BALANCED, ("global_aux_loss", "global_load_balancing_loss")])
def test_a_model_without_opinions(kind: str, name: str, source: Path) -> None:
    settings = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.1}
    provider, found = measured(source, **settings)
    expected = {
        name: 1.0,
        "z_loss": math.log(provider.num_moe_experts) ** 2,
        "mtp_1_loss": math.log(provider.vocab_size),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_they_are_read_once_and_of_one_iteration(source: Path) -> None:
    provider, first = measured(source, 1, indifferent=False, moe_z_loss_coeff=0.1)
    assert set(first) == {"z_loss", "mtp_1_loss"}
    assert min(first.values()) > 0
    assert set(side_losses(provider, 1).values()) == {0.0}


def test_a_dense_model_has_none() -> None:
    assert side_losses(GPTModelProvider(num_layers=1), 1) == {}
