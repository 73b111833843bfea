from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bridge_jobs.latent_job import SIZES
from process_groups import run_ranks

from bridge import distributed
from bridge.provider import GPTModelProvider


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


def test_tensor_parallel_ranks_agree(tmp_path: Path) -> None:
    report = run_ranks(2, "bridge_jobs.latent_job", {}, tmp_path)
    assert report["difference"] < 1e-5
    assert report["alike"]


def test_latents_are_normed_with_an_epsilon_of_their_own() -> None:
    provider = GPTModelProvider(**SIZES, layernorm_epsilon=0.5, latent_layernorm_epsilon=0.25)
    attention = provider.provide_distributed_model(wrap_with_ddp=False)[0].decoder.layers[0].self_attention
    inputs = torch.randn(5, 1, SIZES["kv_lora_rank"])
    projection = attention.linear_kv_up_proj
    projection.layer_norm_weight.data.uniform_()
    normed = inputs / (inputs.square().mean(-1, keepdim=True) + 0.25).sqrt() * projection.layer_norm_weight
    torch.testing.assert_close(projection(inputs)[0], normed @ projection.weight.T)
    assert attention.linear_q_up_proj.eps == 0.25
