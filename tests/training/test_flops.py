"""The table of operations against torch's count of the matrix products of transformers' models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from bridge.provider import GPTModelProvider
from training.flops import flops_per_token, mean_keys

SEQUENCE = 64
HF = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
OURS = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "seq_length": SEQUENCE,
}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16}
MODELS = {
    "dense": ("llama", {"num_key_value_heads": 4}, {"num_query_groups": 4}),
    "grouped": (
        "llama",
        {"num_key_value_heads": 2, "head_dim": 32},
        {"num_query_groups": 2, "kv_channels": 32},
    ),
    "experts": (
        "mixtral",
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"num_query_groups": 2, "num_moe_experts": 4, "moe_router_topk": 2},
    ),
    "latent": (
        "deepseek_v3",
        {
            **LATENT,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 3,
        },
        {
            **LATENT,
            "qk_head_dim": 8,
            "qk_pos_emb_head_dim": 4,
            "v_head_dim": 12,
            "multi_latent_attention": True,
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_table_agrees_with_the_real_products(name):
    model_type, theirs, ours = MODELS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **HF, **theirs))
    if name == "experts":
        model.set_experts_implementation("eager")
    tokens = torch.randint(HF["vocab_size"], (1, SEQUENCE))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    provider = GPTModelProvider(**OURS, **ours).finalize()
    expected = SEQUENCE * flops_per_token(provider, causal=False).training
    # what is no weight's product, such as the angles of rotary embeddings, is counted by torch alone
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-4)


def test_prediction_depths_add_a_layer_and_an_output_each():
    plain = flops_per_token(GPTModelProvider(**OURS).finalize())
    deeper = flops_per_token(GPTModelProvider(**OURS, mtp_num_layers=2).finalize())
    layer = (plain.projections + plain.attention + plain.mlp) / 3
    assert deeper.mtp == 2 * (layer + plain.output + 2 * 2 * 64 * 64)
    assert deeper.output == plain.output


def test_hopper_kits_count():
    """The count that the figures of docs/benchmarks.md are made with: 14.43 GFLOP for a token."""
    llama = GPTModelProvider(
        num_layers=8,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        seq_length=4096,
    ).finalize()
    layers = 8 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    expected = 6 * (layers + 4096 * 128256) + 6 * 8 * 4096 * 4096
    assert flops_per_token(llama).training == expected


def test_windows_count_the_keys_that_are_seen():
    provider = GPTModelProvider(**OURS, window_size=(15, 0), window_attn_skip_freq=3).finalize()
    seen = sum(min(position + 1, 16) for position in range(SEQUENCE)) / SEQUENCE
    assert mean_keys(provider, 0) == pytest.approx(seen, abs=0.5)
    assert mean_keys(provider, 2) == SEQUENCE / 2
