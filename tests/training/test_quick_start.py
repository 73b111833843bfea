"""The training quick start that users of Megatron Bridge know, in plain Python without torchrun."""

import json
import subprocess
import sys

SCRIPT = """
import json
from recipes.llama import llama32_1b_pretrain_config
from training.gpt_step import forward_step
from training.pretrain import pretrain

config = llama32_1b_pretrain_config(seq_length=32, train_iters=4, global_batch_size=4)
config.train.eval_iters = 1
config.scheduler.lr_warmup_iters = 1
config.model.num_layers, config.model.hidden_size, config.model.ffn_hidden_size = 2, 64, 128
config.model.num_attention_heads, config.model.num_query_groups, config.model.kv_channels = 4, 2, 16
config.model.vocab_size = 512
config.tokenizer.vocab_size = config.model.vocab_size
print(json.dumps(pretrain(config, forward_step)))
"""


def test_a_recipe_trains_on_made_up_sequences():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["iteration"], report["stopped"]) == (4, False)
    assert "validation loss" in done.stdout
