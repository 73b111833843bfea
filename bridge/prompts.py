"""Prompts to compare models by: given as token ids, read from a file, or random by a seed."""

import json
from pathlib import Path
from typing import Any

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
        from bridge.distributed import DEFAULT_SEED  # torch: a file is checked without it

        shape = (config.get("num_prompts", 4), config.get("prompt_length", 64))
        prompts = random_prompts(*shape, vocab_size, config.get("seed", DEFAULT_SEED))
    check_tokens(prompts, vocab_size)
    return prompts


def check_prompts(file: Path, ends: list[Path], vocab_size: int) -> None:
    """Refuse a file of prompts as `prompts_of` does, but without a look at the tokens of its text."""
    prompts = read_file(file)
    if isinstance(prompts, str):
        tokenizer_folder(ends)
        check_tokens([[0] for line in lines_of(prompts)], vocab_size)
    else:
        check_tokens(prompts, vocab_size)


def check_tokens(prompts: Prompts, vocab_size: int) -> None:
    if not prompts or not all(prompts):
        raise InputError("there are no prompts to compare: give lists of token ids, or lines of text")
    if outside := [token for prompt in prompts for token in prompt if not 0 <= token < vocab_size]:
        raise InputError(f"token {outside[0]} of a prompt is outside the vocabulary of {vocab_size}")


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> Prompts:
    """Draw `count` prompts of `length` tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def read_prompts(file: Path, ends: list[Path]) -> Prompts:
    """Read a JSON file of lists of token ids, or a text file with a prompt a line."""
    prompts = read_file(file)
    return tokenized(lines_of(prompts), ends) if isinstance(prompts, str) else prompts


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def read_file(file: Path) -> Prompts | str:
    """Return the token ids of a JSON file, or another one's text; what is neither is an InputError."""
    if not file.is_file():
        raise InputError(f"no such file of prompts: {file}")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".json":
            return text
        prompts = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}") from error
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

    folder = tokenizer_folder(ends)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise InputError(f"transformers cannot load the tokenizer of {folder}: {reason}") from error
    return [tokenizer(line)["input_ids"] for line in lines]


def tokenizer_folder(ends: list[Path]) -> Path:
    """Return the folder of the first end that has a tokenizer."""
    for folder in map(side_folder, ends):
        if any(folder.glob("tokenizer*")):
            return folder
    raise InputError(
        "neither end has a tokenizer for prompts of text: give a .json file with lists of token ids"
    )
