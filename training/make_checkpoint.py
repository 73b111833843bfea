"""The job that makes a small Llama-3-shaped Hugging Face checkpoint and tokenizer: the demo's source."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bridge.errors import InputError
from training.corpus import Corpus

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"

# Llama 3.2's shape, scaled down: grouped-query attention, its own rope scaling, tied embeddings
LLAMA = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Make the checkpoint of the job's config and return its size."""
    output = Path(config["output"])
    if (output / "config.json").exists():
        raise InputError(f"{output} already holds a checkpoint: remove it or choose another folder")
    corpus = Corpus(config["corpus"], config.get("exclude", []), config.get("max_bytes"))
    tokenizer = train_tokenizer(corpus, config["vocab_size"])
    tokenizer.save_pretrained(output)
    torch.manual_seed(config.get("seed", 1234))
    model = make_model(tokenizer, config.get("config", {}))
    model.save_pretrained(output, max_shard_size=config.get("max_shard_size", "1MB"))
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vocab_size": len(tokenizer),
        "shards": len(list(output.glob("*.safetensors"))),
    }


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly `vocab_size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.documents(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise InputError(
            f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}:"
            " give more text or another vocab_size (at least 258)"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END)


def make_model(tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any]) -> LlamaForCausalLM:
    """Make a random bf16 model for `tokenizer`; `overrides` are `LlamaConfig` values."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**{**LLAMA, **overrides, **special, "vocab_size": len(tokenizer)})
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(**special, do_sample=True, temperature=0.8)
    return model
