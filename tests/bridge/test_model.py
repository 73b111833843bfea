from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from bridge import distributed
from bridge.auto_bridge import AutoBridge
from bridge.errors import ConfigError
from bridge.families import provider_of
from bridge.hf_checkpoint import read_config
from bridge.provider import GPTModelProvider

TOKENS = torch.arange(24)[None] % 150
POSITIONS = torch.arange(24)[None]


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


def provider(**values: Any) -> GPTModelProvider:
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    return GPTModelProvider(**{**sizes, "vocab_size": 100, "max_position_embeddings": 64, **values})


def test_padding_has_no_part_in_the_loss(hf_checkpoint: Callable[..., Path]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf_checkpoint("llama", dtype="float32"))
    model = bridge.to_megatron_model(wrap_with_ddp=False)[0]
    logits = model(TOKENS, POSITIONS, None)
    losses = model(TOKENS, POSITIONS, None, labels=TOKENS)
    expected = functional.cross_entropy(logits[0, :, :160], TOKENS[0], reduction="none")
    assert logits.shape[-1] == 256
    torch.testing.assert_close(losses[0], expected)


def test_16_bit_weights_are_of_that_precision_throughout(hf_checkpoint: Callable[..., Path]) -> None:
    model = provider_of(read_config(hf_checkpoint("qwen3"))).provide_distributed_model(wrap_with_ddp=False)
    assert {parameter.dtype for parameter in model[0].parameters()} == {torch.bfloat16}


def test_models_of_one_seed_are_equal() -> None:
    weights = []
    for _ in range(2):
        model = provider().provide_distributed_model(wrap_with_ddp=False, seed=5)
        weights.append([parameter.clone() for parameter in model[0].parameters()])
        distributed.finalize()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_other_parallel_sizes_in_one_process_are_refused() -> None:
    distributed.initialize(provider())
    with pytest.raises(
        ConfigError, match="tensor_model_parallel_size is 2, but this process already runs with 1"
    ):
        distributed.initialize(provider(tensor_model_parallel_size=2))


def test_more_ranks_than_started_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 ranks cannot hold tensor x pipeline"):
        provider(tensor_model_parallel_size=4).provide_distributed_model()


def test_transformer_engine_is_refused_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="needs a GPU"):
        provider(transformer_impl="transformer_engine").transformer_config()
