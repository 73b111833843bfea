"""Norms on one rank; tests/bridge/test_layouts.py has them in whole models on two."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_formula import SHAPES, config
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from bridge import distributed
from bridge.norms import AllHeadsRMSNorm, build_norm
from bridge.provider import GPTModelProvider


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    distributed.initialize(GPTModelProvider(**SHAPES))
    yield
    distributed.finalize()


def assert_agree(norm: torch.nn.Module, expected: torch.nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.normal_()
    norm.load_state_dict(expected.state_dict())
    outputs = []
    for module in (norm, expected):
        leaf = inputs.detach().clone().requires_grad_()
        output = module(leaf.flatten(-2)) if module is expected and leaf.dim() == 4 else module(leaf)
        output.square().sum().backward()
        outputs.append((output.flatten(2), leaf.grad, *(p.grad for p in module.parameters())))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("normalization", "expected"), [("RMSNorm", Gemma2RMSNorm), ("LayerNorm", NemotronLayerNorm1P)]
)
def test_zero_centered_norms_are_those_of_transformers(normalization: str, expected: Any) -> None:
    settings = config(normalization=normalization, layernorm_zero_centered_gamma=True)
    norm = build_norm(settings, 32, eps=1e-5)
    assert not any(parameter.any() for parameter in norm.parameters())
    assert_agree(norm, expected(32, eps=1e-5), 3 * torch.randn(6, 2, 32))


@pytest.mark.parametrize(("heads", "number"), [("num_attention_heads", 4), ("num_query_groups", 2)])
def test_norm_of_all_heads_is_that_of_transformers(heads: str, number: int) -> None:
    norm = AllHeadsRMSNorm(8, config(), 1e-5, heads)
    assert_agree(norm, Olmo2RMSNorm(8 * number, eps=1e-5), 3 * torch.randn(6, 2, number, 8))


def test_weights_of_one_rank_are_not_reduced_in_sequence_parallelism() -> None:
    parallel = config(sequence_parallel=True, tensor_model_parallel_size=2)
    assert all(p.sequence_parallel for p in build_norm(parallel, 8).parameters())
    weight = AllHeadsRMSNorm(8, parallel, 1e-5, "num_attention_heads").weight
    assert weight.tensor_model_parallel
    assert not hasattr(weight, "sequence_parallel")
