import math

import pytest
import torch

from training.optimizer_state import boxes, settings_of

SHAPES = [(7,), (4, 5), (3, 4, 5), (2, 1, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_the_stretch_in_its_order(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    for low in range(whole.numel() + 1):
        for high in range(low, whole.numel() + 1):
            found = [
                whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].flatten()
                for offset, size in boxes(shape, low, high)
            ]
            assert torch.equal(torch.cat([*found, whole.new_empty(0)]), whole.flatten()[low:high])


def test_whole_rows_are_one_box():
    assert list(boxes((4, 5), 5, 20)) == [((1, 0), (3, 5))]
    assert list(boxes((4, 5), 3, 18)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 3))]


def test_classes_among_the_settings_are_not_saved():
    group = {"lr": 0.1, "cpu_optimizer_cls": torch.optim.AdamW, "betas": (0.9, 0.95), "params": [0]}
    assert settings_of([group]) == [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0]}]
