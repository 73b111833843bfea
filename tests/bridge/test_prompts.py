"""Prompts: by seed, as token ids, from files of ids or of text."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bridge.errors import InputError
from bridge.prompts import prompts_of


def from_file(file: Path, folder: Path) -> list[list[int]]:
    return prompts_of({"a": str(folder), "b": str(folder), "prompts_file": str(file)}, vocab_size=100)


def test_random_prompts_depend_on_the_seed_alone() -> None:
    config = {"num_prompts": 3, "prompt_length": 5, "seed": 7}
    prompts = prompts_of(config, vocab_size=100)
    assert prompts == prompts_of(config, vocab_size=100)
    assert prompts != prompts_of({**config, "seed": 8}, vocab_size=100)
    assert [len(prompt) for prompt in prompts] == [5, 5, 5]


@pytest.mark.parametrize("prompts", [[[1, 100]], [[1, -1]]])
def test_prompt_outside_the_vocabulary_is_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(InputError, match="outside the vocabulary of 100"):
        prompts_of({"prompts": prompts}, vocab_size=100)


def test_file_of_token_ids(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text("[[1, 2], [3]]")
    assert from_file(tmp_path / "prompts.json", tmp_path) == [[1, 2], [3]]


@pytest.mark.parametrize("content", ["[[1, 2]", "[1, 2]", '[["a"]]', "[[true]]", "[]", "[[]]"])
def test_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(InputError, match=r"lists of token ids|not valid JSON"):
        from_file(tmp_path / "prompts.json", tmp_path)


def test_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    for name in ("prompts.json", "prompts.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InputError, match=f"{name} is not UTF-8 text"):
            from_file(tmp_path / name, tmp_path)


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "prompts.txt").write_text("the cat sat\n")
    with pytest.raises(InputError, match=r"cannot load the tokenizer of .*"):
        from_file(tmp_path / "prompts.txt", tmp_path)


def test_lines_of_text_go_through_the_tokenizer_of_the_checkpoint(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2, "sat": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "prompts.txt").write_text("the cat sat\n\nsat the dog\n")
    assert from_file(tmp_path / "prompts.txt", tmp_path / "hf") == [[1, 2, 3], [3, 1, 0]]


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the cat sat\n")
    with pytest.raises(InputError, match=r"neither end has a tokenizer.*\.json"):
        from_file(tmp_path / "prompts.txt", tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file of prompts"):
        from_file(tmp_path / "none.json", tmp_path)
