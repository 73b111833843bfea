from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_formula import SHAPES, config, inputs, plain_attention
from bridge_jobs.attention_job import CASES
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from process_groups import run_ranks

from bridge import distributed
from bridge.core_attention import CoreAttention, positions_of_rank
from bridge.provider import GPTModelProvider

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    distributed.initialize(GPTModelProvider(**SHAPES))
    yield
    distributed.finalize()


def attention(layer: int = 1, softcap: float | None = None, **values: Any) -> CoreAttention:
    sizes = {name: values.pop(name, None) for name in ("k_channels", "v_channels", "softmax_scale")}
    return CoreAttention(config(**values), layer, AttnMaskType.causal, "self", softcap=softcap, **sizes)


def assert_agrees(
    module: CoreAttention, *, key_size: int = 8, value_size: int = 8, scale: float, **values: Any
) -> None:
    """Compare outputs and all gradients with the plain formula."""
    query, key, value, sinks, weight = inputs(key_size, value_size)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    if module.softmax_offset is not None:
        module.softmax_offset.data.copy_(sinks)
        values["sinks"] = sinks.requires_grad_()
    results = []
    for output in (module(*leaves, None).unflatten(-1, (4, -1)), plain_attention(*leaves, scale, **values)):
        gradients = torch.autograd.grad((output * weight).sum(), leaves, retain_graph=True)
        results.append((output, *gradients))
    torch.testing.assert_close(*results, **TOLERANCE)
    if module.softmax_offset is not None:
        (module(*leaves, None).unflatten(-1, (4, -1)) * weight).sum().backward()
        (plain_attention(*leaves, scale, **values) * weight).sum().backward()
        torch.testing.assert_close(module.softmax_offset.grad, sinks.grad, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_formula(name: str) -> None:
    case = CASES[name]
    formula = {key: case[key] for key in ("softcap",) if key in case}
    assert_agrees(attention(**case), scale=8**-0.5, window=case.get("window_size"), **formula)


def test_keys_and_values_may_differ_in_size() -> None:
    module = attention(k_channels=12, v_channels=6, softmax_scale=0.3)
    assert_agrees(module, key_size=12, value_size=6, scale=0.3)
    assert_agrees(attention(k_channels=12, v_channels=6), key_size=12, value_size=6, scale=12**-0.5)


def test_a_window_holds_for_the_layers_that_have_one() -> None:
    layers = {"window_size": (3, 0), "window_attn_skip_freq": [1, 0]}
    assert_agrees(attention(layer=1, **layers), scale=8**-0.5, window=(3, 0))
    assert_agrees(attention(layer=2, **layers), scale=8**-0.5)


@pytest.mark.parametrize("case", [{}, {"window_size": (2, 0)}, {"softcap": 2.0}])
def test_packed_sequences_do_not_see_each_other(case: dict[str, Any]) -> None:
    query, key, value = (tensor[:, :1] for tensor in inputs()[:3])
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 5, 12, 16], dtype=torch.int32))
    tokens = [tensor.squeeze(1) for tensor in (query, key, value)]
    found = attention(**case)(*tokens, None, packed_seq_params=packed)
    window, softcap = case.get("window_size"), case.get("softcap")
    expected = plain_attention(query, key, value, 8**-0.5, window, softcap, starts=(0, 5, 12))
    torch.testing.assert_close(found, expected.flatten(2), **TOLERANCE)


def test_dropout_is_for_training_and_drawn_from_the_ranks_own_generator() -> None:
    tensors = inputs()[:3]
    module = attention(attention_dropout=0.5)
    state = torch.get_rng_state()
    first, second = module(*tensors, None), module(*tensors, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    module.eval()
    torch.testing.assert_close(module(*tensors, None), attention()(*tensors, None))


def test_positions_cover_the_sequence_in_megatrons_order() -> None:
    assert positions_of_rank(4, 0, 3).tolist() == [0, 1, 10, 11]
    assert positions_of_rank(4, 2, 3).tolist() == [4, 5, 6, 7]
    assert sorted(torch.cat([positions_of_rank(6, rank, 4) for rank in range(4)]).tolist()) == list(range(24))


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    return run_ranks(2, "bridge_jobs.attention_job", {}, tmp_path_factory.mktemp("attention"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["tensor_model_parallel_size", "context_parallel_size"])
def test_two_ranks_agree_with_one(layout: str, name: str, on_two_ranks: dict[str, dict[str, float]]) -> None:
    assert on_two_ranks[layout][name] < 2e-5
