import filecmp
import json

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from bridge.errors import CheckpointError, ConfigError, InputError
from training.build_dataset import build_dataset
from training.corpus import Corpus

FILES = [f"{split}.{kind}" for split in ("train", "valid", "test") for kind in ("bin", "idx")]


@pytest.fixture
def texts(tmp_path):
    lines = [json.dumps({"text": f"document {number} says {'so ' * number}"}) for number in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines, lines[7]]) + "\n")
    return Corpus([str(tmp_path / "text.jsonl")])


def documents(folder, split):
    return [array.tolist() for array in IndexedDataset(str(folder / split))]


def test_every_document_once_and_ended(texts, source, tmp_path):
    record = build_dataset(texts, str(source), tmp_path / "out", [0.8, 0.1, 0.1])
    assert {name: split["documents"] for name, split in record["splits"].items()} in (
        {"train": 33, "valid": 4, "test": 4},
        {"train": 32, "valid": 5, "test": 4},
        {"train": 32, "valid": 4, "test": 5},
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    found = [tokens for split in record["splits"] for tokens in documents(tmp_path / "out", split)]
    assert {tokens[-1] for tokens in found} == {tokenizer.eos_token_id} == {record["eod"]}
    assert sorted(tokenizer.decode(tokens[:-1]) for tokens in found) == sorted(texts.documents())
    assert sum(map(len, found)) == sum(split["tokens"] for split in record["splits"].values())
    assert IndexedDataset(str(tmp_path / "out" / "train")).index.dtype == numpy.uint16


def test_a_repeated_document_is_in_one_split(texts, source, tmp_path):
    build_dataset(texts, str(source), tmp_path / "out", [0.5, 0.25, 0.25])
    splits = [documents(tmp_path / "out", split) for split in ("train", "valid", "test")]
    counts = [len(split) - len(set(map(tuple, split))) for split in splits]
    assert sorted(counts) == [0, 0, 1]


def test_same_text_gives_same_bytes(texts, source, tmp_path):
    for name in ("one", "two"):
        build_dataset(texts, str(source), tmp_path / name, [0.8, 0.1, 0.1])
    match, mismatch, errors = filecmp.cmpfiles(
        tmp_path / "one", tmp_path / "two", [*FILES, "dataset.json"], shallow=False
    )
    assert (len(match), mismatch, errors) == (7, [], [])


def test_split_of_a_document_does_not_depend_on_the_others_order(texts, source, tmp_path):
    lines = (tmp_path / "text.jsonl").read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)))
    build_dataset(texts, str(source), tmp_path / "one", [0.8, 0.1, 0.1])
    build_dataset(Corpus([str(tmp_path / "turned.jsonl")]), str(source), tmp_path / "two", [0.8, 0.1, 0.1])
    assert sorted(documents(tmp_path / "one", "test")) == sorted(documents(tmp_path / "two", "test"))


@pytest.mark.parametrize("split", [[1.0], [0.5, 0.2, 0.2], [1.2, -0.1, -0.1]])
def test_impossible_split(texts, source, tmp_path, split):
    with pytest.raises(ConfigError, match="three fractions"):
        build_dataset(texts, str(source), tmp_path / "out", split)


def test_too_few_documents(source, tmp_path):
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(InputError, match="1 different documents are too few"):
        build_dataset(Corpus([str(tmp_path / "a.txt")]), str(source), tmp_path / "out", [0.8, 0.1, 0.1])
    assert not (tmp_path / "out").exists()


def test_no_tokenizer(texts, tmp_path):
    with pytest.raises(CheckpointError, match="no such tokenizer folder"):
        build_dataset(texts, str(tmp_path / "none"), tmp_path / "out", [0.8, 0.1, 0.1])


def test_a_finished_dataset_is_not_written_over(texts, source, tmp_path):
    build_dataset(texts, str(source), tmp_path / "out", [0.8, 0.1, 0.1])
    with pytest.raises(InputError, match="already holds a dataset"):
        build_dataset(texts, str(source), tmp_path / "out", [0.8, 0.1, 0.1])
