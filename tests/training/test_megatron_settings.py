from importlib.util import find_spec

import pytest

from bridge.errors import ConfigError
from recipes.llama import llama32_1b_pretrain_config
from recipes.qwen3_moe import qwen3_30b_a3b_pretrain_config
from training.megatron_settings import optimizer_settings, transformer_settings


def test_what_megatron_refuses_is_an_error_of_the_config():
    config = llama32_1b_pretrain_config(moe_ffn_hidden_size=8)
    with pytest.raises(ConfigError, match=r"Megatron Core refuses .*: moe_ffn_hidden_size must be None when"):
        transformer_settings(config)


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is here")
def test_transformer_engines_adam_is_refused_where_there_is_none():
    config = llama32_1b_pretrain_config(use_precision_aware_optimizer=True)
    with pytest.raises(ConfigError, match="is Transformer Engine's Adam, which is not here: set it to false"):
        optimizer_settings(config)


@pytest.mark.skipif(find_spec("deep_ep") is not None, reason="it is here")
def test_a_dispatcher_is_refused_where_there_is_none():
    config = qwen3_30b_a3b_pretrain_config(moe_token_dispatcher_type="flex")
    with pytest.raises(
        ConfigError, match="flex needs the package deep_ep, which is not here: choose alltoall"
    ):
        transformer_settings(config)
