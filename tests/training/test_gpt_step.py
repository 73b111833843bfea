"""What the forward step counts: tokens under the mask have no part in any loss."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_hf_checkpoint

from bridge import distributed
from bridge.auto_bridge import AutoBridge
from training.gpt_step import forward_step

TOKENS = torch.arange(24)[None] * 7 % 150
MASKED = slice(10, 14)


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predicting")
    return make_hf_checkpoint(folder / "hf", "glm4_moe", dtype="float32", num_nextn_predict_layers=1)


def gradients(source: Path, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    model = AutoBridge.from_hf_pretrained(source).to_megatron_model(wrap_with_ddp=False)[0]
    mask = torch.ones(TOKENS.shape)
    mask[:, MASKED] = 0
    batch = {
        "tokens": TOKENS,
        "labels": labels,
        "loss_mask": mask,
        "position_ids": torch.arange(24)[None],
    }
    output, loss_function = forward_step(iter([batch]), model)
    loss_function(output)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_label(position: int) -> torch.Tensor:
    labels = TOKENS.roll(-1, dims=1).clone()
    labels[0, position] = 151
    return labels


def test_masked_labels_change_no_gradient_of_prediction_layers(source: Path) -> None:
    expected = gradients(source, TOKENS.roll(-1, dims=1))
    assert any(name.startswith("mtp.") for name in expected)
    for position in (10, 12, 13):
        found = gradients(source, with_label(position))
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_other_labels_change_them(source: Path) -> None:
    expected = gradients(source, TOKENS.roll(-1, dims=1))
    found = gradients(source, with_label(14))
    name = "mtp.layers.0.eh_proj.weight"
    assert not torch.equal(found[name], expected[name])
