import math
import re
import subprocess
import sys

import pytest

from bridge.errors import ConfigError
from bridge.families import plan_weights
from recipes.registry import all_recipes, recipe_named
from training.memory_estimate import estimate_memory
from training.parallel_plan import USABLE
from training.time_estimate import GPUS

# billions of parameters as the models' cards say
SIZES = {
    "llama2_7b": 6.74,
    "llama3_8b": 8.03,
    "llama31_70b": 70.6,
    "llama31_405b": 406,
    "llama32_1b": 1.24,
    "llama32_3b": 3.21,
    "mistral_7b": 7.25,
    "qwen2_500m": 0.494,
    "qwen2_7b": 7.62,
    "qwen25_14b": 14.8,
    "qwen25_32b": 32.8,
    "qwen25_72b": 72.7,
    "qwen3_600m": 0.596,
    "qwen3_8b": 8.19,
    "qwen3_32b": 32.8,
    "qwen3_30b_a3b": 30.5,
    "qwen3_235b_a22b": 235.1,
}
PRETRAINING = [name for name in all_recipes() if name != "continued_pretrain_config"]


@pytest.mark.parametrize("name", PRETRAINING)
def test_recipe_is_complete_and_possible(name):
    config = all_recipes()[name]()
    assert config.validate(config.model.model_parallel_size * 2).model.hf_model_type


@pytest.mark.parametrize("name", PRETRAINING)
def test_recipe_fits_the_gpus_that_its_docstring_names(name):
    recipe = all_recipes()[name]
    num_gpus = int(re.search(r"(\d+) H100s", recipe.__doc__)[1])
    config = recipe().validate(num_gpus)
    assert estimate_memory(config, num_gpus).total <= USABLE * GPUS["h100"].memory * 2**30


@pytest.mark.parametrize(
    ("changes", "chunks", "counted"),
    [
        ({}, 8, True),
        ({"pipeline_model_parallel_size": 16}, 8, True),
        ({"pipeline_model_parallel_size": 32}, None, True),
        ({"pipeline_model_parallel_size": 9}, None, False),
        ({"pipeline_model_parallel_size": 1}, None, False),
        ({"virtual_pipeline_model_parallel_size": 2}, 2, True),
        ({"num_layers": 6, "pipeline_model_parallel_size": 2}, None, True),
        ({"num_layers_in_first_pipeline_stage": 14}, None, False),
    ],
)
def test_another_number_of_stages_splits_the_layers_as_it_can(changes, chunks, counted):
    model = recipe_named("llama31_405b_pretrain_config")(**changes).model.finalize()
    assert model.virtual_pipeline_model_parallel_size == chunks
    assert model.account_for_embedding_in_pipeline_split is counted
    assert model.account_for_loss_in_pipeline_split is counted


@pytest.mark.parametrize(("model", "billions"), SIZES.items())
def test_sizes_are_those_of_the_released_models(model, billions):
    shapes = plan_weights(all_recipes()[f"{model}_pretrain_config"]().model).megatron_shapes
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(billions, rel=0.005)


def test_recipes_do_not_share_what_one_changes():
    one, other = (recipe_named("llama32_1b_pretrain_config")() for _ in range(2))
    one.model.rope_parameters["factor"] = 1.0
    one.train.train_iters = 1
    assert other == recipe_named("llama32_1b_pretrain_config")()


def test_a_recipe_takes_changes_by_field_name():
    recipe = recipe_named("llama31_70b_pretrain_config")
    config = recipe(seq_length=1024, train_iters=100, lr=1e-4, tensor_model_parallel_size=1)
    assert (config.model.seq_length, config.train.train_iters) == (1024, 100)
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-4, pytest.approx(1e-5))
    assert not config.model.sequence_parallel
    config.validate(config.model.model_parallel_size)
    with pytest.raises(ConfigError, match=r"did you mean 'train\.train_iters'"):
        recipe(train_iter=100)
    for changes in ({"seq_length": "long"}, {"train_iters": "100"}, {"lr": "x"}):
        with pytest.raises(ConfigError, match=r"expected (int|float)"):
            recipe(**changes)


def test_a_field_that_sections_share_is_the_models():
    config = recipe_named("llama32_1b_pretrain_config")(vocab_size=1000)
    assert (config.model.vocab_size, config.tokenizer.vocab_size) == (1000, None)


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_recipe_passes_changes_on(name):
    config = all_recipes()[name](seq_length=96, global_batch_size=24)
    assert (config.model.seq_length, config.train.global_batch_size) == (96, 24)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'llama32_1b_pretrain_config'"):
        recipe_named("llama3.2_1b_pretrain_config")


def test_recipes_load_no_torch():
    code = (
        "import sys; from recipes import registry; registry.all_recipes(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
