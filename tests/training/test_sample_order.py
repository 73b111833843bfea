"""The samples of a run are those of Megatron's dataset, and their order does not depend on its length."""

import json
import subprocess
import sys
import time

import numpy
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from training.blend import find_parts
from training.build_dataset import build_dataset
from training.config import DatasetConfig
from training.corpus import Corpus
from training.data import DatasetTokenizer, build_datasets, megatron_config
from training.sample_order import EpochDataset

LENGTH = 16


@pytest.fixture(scope="module")
def prefixes(source, tmp_path_factory):
    """Two datasets, of about 1,000 and 400 tokens."""
    folder = tmp_path_factory.mktemp("order")
    for name, count in (("large", 60), ("small", 25)):
        lines = [
            json.dumps({"text": f"{name} document {number} {'la ' * (number % 7)}"})
            for number in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        build_dataset(Corpus([str(folder / f"{name}.jsonl")]), str(source), folder / name)
    return folder / "large", folder / "small"


def settings(prefixes, cache, **fields):
    blend = (
        [str(prefixes)] if not isinstance(prefixes, tuple) else [0.7, str(prefixes[0]), 0.3, str(prefixes[1])]
    )
    return DatasetConfig(blend=blend, split="1", path_to_cache=str(cache), **fields)


def samples(dataset, count=None):
    return torch.stack(
        [dataset[index]["tokens"] for index in range(len(dataset) if count is None else count)]
    )


def train_samples(config, size, length=LENGTH):
    dataset = build_datasets(config, {"train": size}, length, 300)["train"]
    assert size is None or len(dataset) >= size
    return samples(dataset, size)


def test_first_epoch_is_megatrons(prefixes, tmp_path):
    config = settings(prefixes[0], tmp_path / "ours")
    (part,) = find_parts(config, ["train"])["train"]
    megatron = megatron_config(config, DatasetTokenizer(0, 300), LENGTH)
    megatron.path_to_cache = str(tmp_path / "megatron")
    documents = numpy.arange(part.end, dtype=numpy.int32)
    judge = GPTDataset(
        IndexedDataset(str(part.prefix)), str(part.prefix), documents, None, Split.train, megatron
    )
    ours = build_datasets(config, {"train": None}, LENGTH, 300)["train"]
    assert len(ours) == len(judge) > 50
    for index in range(len(ours)):
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(ours[index][key], judge[index][key])


@pytest.mark.parametrize("blended", [False, True])
def test_a_longer_run_begins_like_a_shorter_one(prefixes, tmp_path, blended):
    config = settings(prefixes if blended else prefixes[0], tmp_path / "cache")
    longest = train_samples(config, 700)
    for size in (1, 40, 64, 65, 130, 333, 699):
        assert torch.equal(train_samples(config, size), longest[:size])


def test_megatrons_own_order_depends_on_the_length(prefixes, tmp_path):
    """The reason for an order of our own; if this fails, EpochDataset has become needless."""
    config = settings(prefixes[0], tmp_path / "cache")
    (part,) = find_parts(config, ["train"])["train"]
    found = []
    for size in (100, 300):
        megatron = megatron_config(config, DatasetTokenizer(0, 300), LENGTH)
        documents = numpy.arange(part.end, dtype=numpy.int32)
        indexed = IndexedDataset(str(part.prefix))
        judge = GPTDataset(indexed, str(part.prefix), documents, size, Split.train, megatron)
        found.append(samples(judge, 100))
    assert not torch.equal(*found)


def test_every_epoch_has_all_documents_in_an_order_of_its_own(prefixes, tmp_path):
    config = settings(prefixes[0], tmp_path / "cache")
    (part,) = find_parts(config, ["train"])["train"]
    epoch = part.tokens // LENGTH
    dataset = build_datasets(config, {"train": 3 * epoch}, LENGTH, 300)["train"]
    documents = dataset.document_index.reshape(-1, part.end)
    assert len(documents) >= 3
    assert all(sorted(each) == list(range(part.end)) for each in documents.tolist())
    assert len({tuple(each) for each in documents.tolist()}) == len(documents)
    order = dataset.shuffle_index
    assert sorted(order.tolist()) == list(range(len(dataset)))
    first = (part.tokens - 1) // LENGTH
    assert sorted(order[:first].tolist()) == list(range(first))
    assert order[:first].tolist() != list(range(first))


def test_seed_and_length_change_the_samples(prefixes, tmp_path):
    config = settings(prefixes[0], tmp_path / "cache")
    other = settings(prefixes[0], tmp_path / "cache", random_seed=1)
    assert not torch.equal(train_samples(config, 40), train_samples(other, 40))
    assert train_samples(config, 40, length=8).shape == (40, 8)


def test_blend_draws_by_weight_all_along(prefixes, tmp_path):
    dataset = build_datasets(settings(prefixes, tmp_path / "cache"), {"train": 200}, LENGTH, 300)["train"]
    for count in (10, 50, 200):
        assert numpy.bincount(dataset.which[:count]).tolist() == pytest.approx(
            [0.7 * count, 0.3 * count], abs=1
        )
    for number in (0, 1):
        taken = dataset.sample[dataset.which == number]
        assert taken.tolist() == list(range(len(taken)))


def test_one_pass_over_a_blend(prefixes, tmp_path):
    config = DatasetConfig(blend=[str(each) for each in prefixes], split="1", path_to_cache=str(tmp_path))
    alone = [train_samples(settings(each, tmp_path), None) for each in prefixes]
    assert torch.equal(train_samples(config, None), torch.cat(alone))


def test_no_loss_where_a_document_has_ended(prefixes, tmp_path):
    eod = json.loads(prefixes[0].with_name("large.json").read_text())["eod"]
    for masked in (False, True):
        config = settings(prefixes[0], tmp_path / "cache", eod_mask_loss=masked)
        dataset = build_datasets(config, {"train": None}, LENGTH, 300)["train"]
        ends = [dataset[index]["loss_mask"][dataset[index]["tokens"] == eod] for index in range(len(dataset))]
        assert torch.cat(ends).unique().tolist() == [0.0 if masked else 1.0]
        assert dataset[0]["loss_mask"].sum() == LENGTH - masked * (dataset[0]["tokens"] == eod).sum()


def test_padding_has_no_loss(prefixes, tmp_path):
    config = settings(prefixes[0], tmp_path / "cache")
    (part,) = find_parts(config, ["train"])["train"]
    sample = EpochDataset(part, None, "train", megatron_config(config, DatasetTokenizer(0, 300), LENGTH))[
        None
    ]
    assert sample["loss_mask"].sum() == 0


def test_indices_are_found_again(prefixes, tmp_path):
    config = settings(prefixes, tmp_path / "cache")
    train_samples(config, 100)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert len(written) == 3 * 4
    train_samples(config, 100)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == written
    train_samples(config, 101)  # another blend, of the same whole epochs
    assert len(list((tmp_path / "cache").iterdir())) == 4


FIND_OR_BUILD = """
import os, sys, time
from pathlib import Path
import numpy
from training.sample_order import kept

cache, log = map(Path, sys.argv[1:3])

def slow_arrays():
    with log.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(sys.argv[3]))
    return {"numbers": numpy.arange(5)}

assert kept(cache, "test", ["content"], slow_arrays)["numbers"].tolist() == [0, 1, 2, 3, 4]
"""


def test_one_process_builds_and_a_killed_one_leaves_no_half(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    command = [sys.executable, "-W", "ignore", "-c", FIND_OR_BUILD, str(cache), str(log)]
    killed = subprocess.Popen([*command, "300"])
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not list(cache.iterdir())
    processes = [subprocess.Popen([*command, "0.5"]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(log.read_text().split()) == 2  # the killed one and one of the two
