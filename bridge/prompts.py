"""Prompts to compare models by: given as token ids, read from a file, or random by a seed."""

import json
from pathlib import Path
from typing import Any

from bridge.distributed import DEFAULT_SEED
from bridge.errors import InputError
from bridge.megatron_checkpoint import side_folder

Prompts = list[list[int]]


def prompts_of(config: dict[str, Any], vocab_size: int) -> Prompts:
    """Return a job's `prompts`, those of `prompts_file`, or random ones that depend on the seed alone.

    The ends `a` and `b`, and `config_from`, are asked for a tokenizer when the file is text. A token outside
    the vocabulary is an InputError.
    """
    prompts = config.get("prompts")
    if prompts is None and config.get("prompts_file"):
        folders = [config["a"], config["b"], config.get("config_from")]
        prompts = read_prompts(Path(config["prompts_file"]), [Path(folder) for folder in folders if folder])
    if prompts is None:
        shape = (config.get("num_prompts", 4), config.get("prompt_length", 64))
        prompts = random_prompts(*shape, vocab_size, config.get("seed", DEFAULT_SEED))
    if not prompts or not all(prompts):
        raise InputError("there are no prompts to compare: give lists of token ids, or lines of text")
    if outside := [token for prompt in prompts for token in prompt if not 0 <= token < vocab_size]:
        raise InputError(f"token {outside[0]} of a prompt is outside the vocabulary of {vocab_size}")
    return prompts


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> Prompts:
    """Draw `count` prompts of `length` tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def read_prompts(file: Path, ends: list[Path]) -> Prompts:
    """Read a JSON file of lists of token ids, or a text file with a prompt a line."""
    if not file.is_file():
        raise InputError(f"no such file of prompts: {file}")
    if file.suffix != ".json":
        return tokenized([line for line in file.read_text().splitlines() if line.strip()], ends)
    try:
        prompts = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(prompts, list) or not all(map(is_prompt, prompts)):
        raise InputError(f"{file} holds no list of lists of token ids, such as [[1, 5, 9], [2, 7]]")
    return prompts


def is_prompt(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def tokenized(lines: list[str], ends: list[Path]) -> Prompts:
    """Turn lines of text into token ids by the tokenizer of the first end that has one."""
    from transformers import AutoTokenizer

    for folder in map(side_folder, ends):
        if any(folder.glob("tokenizer*")):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return [tokenizer(line)["input_ids"] for line in lines]
    raise InputError(
        "neither end has a tokenizer for prompts of text: give a .json file with lists of token ids"
    )
