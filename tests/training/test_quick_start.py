"""The training quick start that users of Megatron Bridge know, in plain Python without torchrun."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json
from functools import partial
from bridge.errors import ConfigError
from recipes.llama import llama32_1b_pretrain_config
from training.gpt_step import forward_step, get_batch, token_loss
from training.pretrain import pretrain

config = llama32_1b_pretrain_config(seq_length=32, train_iters=4, global_batch_size=4)
config.train.eval_iters = 1
config.model.num_layers, config.model.hidden_size, config.model.ffn_hidden_size = 2, 64, 128
config.model.num_attention_heads, config.model.num_query_groups, config.model.kv_channels = 4, 2, 16
config.model.vocab_size = 512
config.tokenizer.vocab_size = config.model.vocab_size


def half_loss(mask, losses):
    total, num_tokens, found = token_loss(mask, losses)
    return total / 2, num_tokens, {name: found[name] / 2 if name == "loss" else found[name] for name in KEPT}


def own_step(data, model):
    batch = get_batch(data)
    output = model(batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"])
    return output, partial(half_loss, batch["loss_mask"])


KEPT = ("loss", "num_tokens")
config.optimizer.clip_grad = 0.0
reports = [pretrain(config, forward_step), pretrain(config), pretrain(config, own_step)]
config.rng.seed = 7
reports.append(pretrain(config))
KEPT = ("loss",)
try:
    pretrain(config, own_step)
except ConfigError as error:
    reports.append(str(error))
config.checkpoint.save_interval = 2
try:
    pretrain(config)
except ConfigError as error:
    reports.append(str(error))
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def said() -> str:
    return subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout


def test_a_recipe_trains_on_made_up_sequences(said):
    report = json.loads(said.splitlines()[-1])[0]
    assert (report["iteration"], report["stopped"]) == (4, False)
    assert "validation loss" in said


def test_another_run_in_the_same_process_begins_with_its_own_seed(said):
    first, again, _, other = (report["loss"] for report in json.loads(said.splitlines()[-1])[:4])
    assert again == first
    assert other != first


def test_a_forward_step_of_ones_own(said):
    """Adam takes half of a loss as the whole, but for its epsilon."""
    first, _, half, *_ = json.loads(said.splitlines()[-1])
    assert 2 * half["loss"] == pytest.approx(first["loss"], rel=1e-3)


def test_what_pretrain_refuses(said):
    no_tokens, no_folder = json.loads(said.splitlines()[-1])[4:]
    assert no_tokens.startswith("the forward step's loss function measured loss, but not 'num_tokens': let")
    assert no_folder == "checkpoint.save_interval needs checkpoint.save, the folder of the checkpoints"
