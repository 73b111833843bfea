import json
import shutil
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from bridge.errors import CheckpointError, ConfigError
from training.blend import (
    check_files,
    check_settings,
    find_parts,
    parse_blend,
    parse_split,
    with_absolute_paths,
)
from training.build_dataset import build_dataset
from training.config import DatasetConfig
from training.corpus import Corpus


@pytest.fixture(scope="module")
def single(source, tmp_path_factory):
    """A prefix of a dataset that is not divided."""
    folder = tmp_path_factory.mktemp("single")
    lines = [json.dumps({"text": f"document {number} " * (number + 1)}) for number in range(37)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    build_dataset(Corpus([str(folder / "text.jsonl")]), str(source), folder / "words")
    return folder / "words"


@pytest.mark.parametrize(
    "value",
    [
        [{"path": "a", "weight": 0.3}, {"path": "b", "weight": 0.7}],
        [0.3, "a", 0.7, "b"],
        ["0.3", "a", "0.7", "b"],
        [["a", "b"], [0.3, 0.7]],
        (["a", "b"], [0.3, 0.7]),
    ],
)
def test_forms_of_a_blend(value):
    assert parse_blend(value, "dataset.blend") == [("a", 0.3), ("b", 0.7)]


@pytest.mark.parametrize("value", [["a", "b"], [{"path": "a"}, {"path": "b"}], [["a", "b"], None]])
def test_blend_without_weights(value):
    assert parse_blend(value, "dataset.blend") == [("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blend": [{"path": "a", "wieght": 1}]}, "dataset.blend holds {'path': 'a', 'wieght': 1}: expected"),
        ({"blend": [0.3, "a", 0.7]}, "ends with a weight without a path"),
        ({"blend": [0.3, 0.7, "a", "b"]}, "holds 0.7 where a path belongs"),
        ({"blend": [0, "a", 1, "b"]}, "the weight of a is 0, expected a number above 0"),
        ({"blend": [-1, "a", 1, "b"]}, "the weight of a is -1"),
        ({"blend": [{"path": "a", "weight": "much"}]}, "the weight of a is 'much'"),
        ({"blend": [["a", "b"], [1.0]]}, "1 weights for 2 paths"),
        ({"blend": [{"path": "a", "weight": 1}, "b"]}, "weights for some paths only"),
        ({"blend": ["a", "b", "a"]}, "names a twice"),
        ({"blend": ["a"], "blend_per_split": {"train": ["b"]}}, "are both given"),
        ({"blend_per_split": {"training": ["b"]}}, "names 'training': allowed are train, valid, test"),
        ({"blend_per_split": {"train": "b"}}, "dataset.blend_per_split.train is 'b': expected a list"),
        ({"blend_per_split": {"train": ["b"]}, "split": "9,1,0"}, "dataset.split divides"),
        ({"blend": ["a"], "split": "most"}, "dataset.split is 'most': give up to three shares"),
        ({"blend": ["a"], "split": "1,1,1,1"}, "give up to three shares"),
        ({"blend": ["a"], "split": "1,-1"}, "give up to three shares"),
    ],
)
def test_mistakes_are_named_without_files(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(DatasetConfig(**settings))


@pytest.mark.parametrize("split", ["969,30,1", "98,2,0", "1", "99, 1", "0.7,0.2,0.1", "1,1,1"])
@pytest.mark.parametrize("documents", [7, 1000, 12345])
def test_split_takes_the_documents_that_megatron_would(split, documents):
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    ours = [tuple(round(bound * documents) for bound in bounds) for bounds in parse_split(split)]
    for bounds, expected in zip(ours, matrix, strict=True):
        if expected is None:
            assert bounds[0] == bounds[1]
        else:
            assert bounds == tuple(round(bound * float(documents)) for bound in expected)


def test_parts_of_a_divided_prefix(single):
    config = DatasetConfig(blend=[str(single)], split="6,3,1")
    parts = {split: part for split, (part,) in find_parts(config, ["train", "valid", "test"]).items()}
    bounds = [(part.begin, part.end) for part in parts.values()]
    assert bounds == [(0, 22), (22, 33), (33, 37)]
    record = json.loads(single.with_name("words.json").read_text())["splits"]["words"]
    assert sum(part.tokens for part in parts.values()) == record["tokens"]
    lengths = numpy.fromfile(single.with_name("words.idx"), "<i4", 37, offset=34)
    assert parts["valid"].tokens == lengths[22:33].sum()


def test_parts_of_splits_and_of_a_blend_per_split(dataset, single):
    record = json.loads((dataset / "dataset.json").read_text())["splits"]
    (part,) = find_parts(DatasetConfig(blend=[str(dataset)]), ["valid"])["valid"]
    assert (part.prefix, part.tokens, part.end) == (
        dataset / "valid",
        record["valid"]["tokens"],
        record["valid"]["documents"],
    )
    config = DatasetConfig(
        blend_per_split={"train": [3, str(single), 1, str(dataset)], "valid": [str(dataset / "test")]}
    )
    parts = find_parts(config, ["train", "valid"])
    assert [(part.prefix, part.weight) for part in parts["train"]] == [
        (single, 3.0),
        (dataset / "train", 1.0),
    ]
    assert [part.prefix for part in parts["valid"]] == [dataset / "test"]
    with pytest.raises(ConfigError, match="blend_per_split has no 'test'"):
        find_parts(config, ["test"])


def test_damaged_files_are_named_before_anything_is_built(dataset, tmp_path):
    def check(name, change):
        damaged = shutil.copytree(dataset, tmp_path / name)
        change(damaged / "train.bin")
        with pytest.raises(CheckpointError, match=f"{name}/train"):
            check_files(DatasetConfig(blend=[str(damaged)]), ["train"], 32, 300)

    check("missing", Path.unlink)
    check("shorter", lambda file: file.write_bytes(file.read_bytes()[:-2]))


def test_mistakes_are_named_before_anything_is_built(dataset, single, tmp_path):
    def check(blend, splits=("train",), seq_length=32, vocab_size=300, **settings):
        config = DatasetConfig(blend=[str(path) for path in blend], **settings)
        check_files(config, list(splits), seq_length, vocab_size)

    other = shutil.copytree(dataset, tmp_path / "other")
    record = json.loads((dataset / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**record, "tokenizer": {}}))
    short = shutil.copytree(dataset, tmp_path / "short")
    (short / "dataset.json").write_text(
        json.dumps({**record, "splits": {"train": record["splits"]["train"]}})
    )
    check([dataset], ["train", "valid", "test"])
    check([single], ["train", "valid"], split="9,1")
    with pytest.raises(ConfigError, match="blend is empty"):
        check([])
    with pytest.raises(CheckpointError, match="is not a complete dataset folder"):
        check([tmp_path])
    with pytest.raises(CheckpointError, match="none is no complete dataset"):
        check([tmp_path / "none"])
    with pytest.raises(ConfigError, match="made with different tokenizers"):
        check([dataset, other])
    with pytest.raises(ConfigError, match="has no 'valid' split: it has train"):
        check([short], splits=("train", "valid"))
    with pytest.raises(ConfigError, match="vocabulary of 300 tokens, the model one of 299"):
        check([dataset], vocab_size=299)
    with pytest.raises(ConfigError, match="too few for one sample"):
        check([dataset], seq_length=1_000_000)
    with pytest.raises(ConfigError, match=r"words is not divided into splits: set dataset.split"):
        check([single])
    with pytest.raises(ConfigError, match="has splits of its own: leave it out"):
        check([dataset], split="9,1")
    with pytest.raises(ConfigError, match=r"the 'test' split of .* has no documents"):
        check([single], ["test"], split="9,1")


def test_paths_are_absolute_in_a_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DatasetConfig(blend=[0.3, "a", 0.7, "/b"], path_to_cache="cache")
    resolved = with_absolute_paths(config)
    assert resolved.blend == [{"path": f"{tmp_path}/a", "weight": 0.3}, {"path": "/b", "weight": 0.7}]
    assert resolved.path_to_cache == f"{tmp_path}/cache"
    assert with_absolute_paths(resolved) == resolved
