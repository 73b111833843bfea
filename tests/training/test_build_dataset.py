import filecmp
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy
import psutil
import pyarrow
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet
from transformers import AutoTokenizer

from bridge.errors import CheckpointError, ConfigError, InputError
from bridge.folder_lock import locked
from training import shards
from training.benchmark_data import plain_build
from training.build_dataset import Options, build_dataset
from training.corpus import Corpus

LONGEST = 240  # seconds, to end a hang
SPLIT = Options(split=[0.8, 0.1, 0.1])
FILES = [f"{split}.{kind}" for split in ("train", "valid", "test") for kind in ("bin", "idx")]
SMALL = 300  # bytes of a slice: the texts below make more than ten
LINES = [json.dumps({"text": f"document {number} says {'só ' * number}"}) for number in range(40)]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join([*LINES, LINES[7]]) + "\n")
    return Corpus([str(tmp_path / "text.jsonl")])


@pytest.fixture(scope="module")
def tokenizer(source):
    return AutoTokenizer.from_pretrained(source)


def documents(folder, split):
    return [array.tolist() for array in IndexedDataset(str(folder / split))]


def same(one: Path, two: Path, kinds=(".bin", ".idx")) -> bool:
    pairs = [(one.with_name(one.name + kind), two.with_name(two.name + kind)) for kind in kinds]
    return all(filecmp.cmp(*pair, shallow=False) for pair in pairs)


def test_every_document_once_and_ended(texts, source, tokenizer, tmp_path):
    record = build_dataset(texts, str(source), tmp_path / "out", SPLIT)
    assert {name: split["documents"] for name, split in record["splits"].items()} in (
        {"train": 33, "valid": 4, "test": 4},
        {"train": 32, "valid": 5, "test": 4},
        {"train": 32, "valid": 4, "test": 5},
    )
    found = [tokens for split in record["splits"] for tokens in documents(tmp_path / "out", split)]
    assert {tokens[-1] for tokens in found} == {tokenizer.eos_token_id} == {record["eod"]}
    assert sorted(tokenizer.decode(tokens[:-1]) for tokens in found) == sorted(texts.documents())
    assert sum(map(len, found)) == sum(split["tokens"] for split in record["splits"].values())
    assert sum(len(text.encode()) for text in texts.documents()) == sum(
        split["bytes"] for split in record["splits"].values()
    )
    assert IndexedDataset(str(tmp_path / "out" / "train")).index.dtype == numpy.uint16


def test_a_repeated_document_is_in_one_split(texts, source, tmp_path):
    build_dataset(texts, str(source), tmp_path / "out", Options(split=[0.5, 0.25, 0.25]))
    splits = [documents(tmp_path / "out", split) for split in ("train", "valid", "test")]
    counts = [len(split) - len(set(map(tuple, split))) for split in splits]
    assert sorted(counts) == [0, 0, 1]
    assert not {tuple(tokens) for tokens in splits[0]} & {tuple(tokens) for tokens in splits[1]}


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("slice_bytes", [SMALL, 1 << 20])
def test_same_bytes_as_the_plain_loop(texts, source, tokenizer, tmp_path, append_eod, slice_bytes):
    plain_build(texts.documents(), tokenizer, tmp_path / "plain", append_eod=append_eod)
    build_dataset(
        texts, str(source), tmp_path / "built", Options(append_eod=append_eod, slice_bytes=slice_bytes)
    )
    assert same(tmp_path / "built", tmp_path / "plain")


def test_same_bytes_for_any_number_of_workers(texts, source, tmp_path):
    for name, split in (("one", None), ("two", [0.8, 0.1, 0.1])):
        for workers in (1, 2):
            options = Options(split=split, workers=workers, slice_bytes=SMALL)
            build_dataset(texts, str(source), tmp_path / f"with {workers}" / name, options)
    match, mismatch, errors = filecmp.cmpfiles(
        tmp_path / "with 1" / "two", tmp_path / "with 2" / "two", [*FILES, "dataset.json"], shallow=False
    )
    assert (len(match), mismatch, errors) == (7, [], [])
    assert same(tmp_path / "with 1" / "one", tmp_path / "with 2" / "one", (".bin", ".idx", ".json"))


def test_large_vocabulary_is_stored_in_32_bits(texts, source, tokenizer, tmp_path):
    shutil.copytree(source, tmp_path / "large")
    large = AutoTokenizer.from_pretrained(source)
    large.add_tokens([f"<{number}>" for number in range(65500 - len(large))])
    large.save_pretrained(tmp_path / "large")
    plain_build(texts.documents(), large, tmp_path / "plain")
    record = build_dataset(texts, str(tmp_path / "large"), tmp_path / "built")
    assert (record["vocab_size"], record["dtype"]) == (65500, "<i4")
    assert same(tmp_path / "built", tmp_path / "plain")


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_special_tokens_in_text_are_read_as_transformers_does(source, tmp_path, split_special_tokens):
    shutil.copytree(source, tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "split_special_tokens": split_special_tokens})
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = f"one {tokenizer.eos_token} two"
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}))
    count = plain_build([text], tokenizer, tmp_path / "plain")
    build_dataset(Corpus([str(tmp_path / "text.jsonl")]), str(tmp_path / "tokenizer"), tmp_path / "built")
    assert same(tmp_path / "built", tmp_path / "plain")
    assert (count > 12) == split_special_tokens


def test_formats_say_the_same(texts, source, tmp_path):
    content = (tmp_path / "text.jsonl").read_bytes()
    values = [json.loads(line)["text"] for line in content.splitlines()]
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
    (tmp_path / "text.jsonl.zst").write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    table = pyarrow.table({"number": list(range(len(values))), "text": values})
    parquet.write_table(table, tmp_path / "text.parquet", row_group_size=9)
    for number, value in enumerate(values):
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:03}.txt").write_text(value)
    build_dataset(texts, str(source), tmp_path / "expected")
    for name in ("text.jsonl.gz", "text.jsonl.zst", "text.parquet", "texts", "texts/*.txt"):
        output = tmp_path / "built" / name.replace("/*", ".")
        build_dataset(Corpus([str(tmp_path / name)]), str(source), output, Options(slice_bytes=SMALL))
        assert same(output, tmp_path / "expected"), name


def test_url_is_read_like_a_file(texts, source, tmp_path):
    remote = Corpus([f"file://{tmp_path}/text.jsonl"])
    for name, corpus in (("local", texts), ("remote", remote)):
        build_dataset(corpus, str(source), tmp_path / name, Options(slice_bytes=SMALL))
    assert same(tmp_path / "local", tmp_path / "remote")
    with pytest.raises(InputError, match="no such text file or folder: file://"):
        list(Corpus([f"file://{tmp_path}/none.jsonl"]).files())


def test_max_bytes_cuts_at_the_same_document(texts, source, tokenizer, tmp_path):
    limited = Corpus(texts.inputs, max_bytes=700)
    plain_build(limited.documents(), tokenizer, tmp_path / "plain")
    record = build_dataset(limited, str(source), tmp_path / "built", Options(slice_bytes=SMALL))
    assert same(tmp_path / "built", tmp_path / "plain")
    assert 600 < record["splits"]["built"]["bytes"] <= 700


def test_split_of_a_document_does_not_depend_on_the_others_order(texts, source, tmp_path):
    lines = (tmp_path / "text.jsonl").read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)))
    build_dataset(texts, str(source), tmp_path / "one", SPLIT)
    build_dataset(Corpus([str(tmp_path / "turned.jsonl")]), str(source), tmp_path / "two", SPLIT)
    assert sorted(documents(tmp_path / "one", "test")) == sorted(documents(tmp_path / "two", "test"))


@pytest.mark.parametrize("split", [[1.0], [0.5, 0.2, 0.2], [1.2, -0.1, -0.1]])
def test_impossible_split(texts, source, tmp_path, split):
    with pytest.raises(ConfigError, match="three fractions"):
        build_dataset(texts, str(source), tmp_path / "out", Options(split=split))


def test_too_few_documents(source, tmp_path):
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(InputError, match="1 different documents are too few"):
        build_dataset(Corpus([str(tmp_path / "a.txt")]), str(source), tmp_path / "out", SPLIT)
    assert not (tmp_path / "out").exists()


def test_nothing_but_blank_texts(source, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " \\n"}\n\n')
    with pytest.raises(InputError, match=r"no documents in .*a.jsonl: every text is blank"):
        build_dataset(Corpus([str(tmp_path / "a.jsonl")]), str(source), tmp_path / "out")


def test_an_empty_file_among_others_has_no_documents(texts, source, tmp_path):
    build_dataset(texts, str(source), tmp_path / "one")
    (tmp_path / "empty.jsonl").touch()
    with_empty = Corpus([str(tmp_path / "empty.jsonl"), *texts.inputs])
    build_dataset(with_empty, str(source), tmp_path / "two")
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    with pytest.raises(InputError, match=r"no documents in .*empty.jsonl"):
        build_dataset(Corpus([str(tmp_path / "empty.jsonl")]), str(source), tmp_path / "out")


def test_no_tokenizer(texts, tmp_path):
    with pytest.raises(CheckpointError, match="no such tokenizer folder"):
        build_dataset(texts, str(tmp_path / "none"), tmp_path / "out", SPLIT)
    with pytest.raises(CheckpointError, match=r"has no tokenizer that transformers can load: .+"):
        build_dataset(texts, str(tmp_path), tmp_path / "out", SPLIT)


def test_an_output_that_cannot_be_written(texts, source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file/out: .*name another output"):
        build_dataset(texts, str(source), tmp_path / "file" / "out")


def test_a_finished_dataset_is_not_written_over(texts, source, tmp_path):
    for name, options in (("folder", SPLIT), ("single", Options())):
        build_dataset(texts, str(source), tmp_path / name, options)
        with pytest.raises(InputError, match="already holds a dataset"):
            build_dataset(texts, str(source), tmp_path / name, options)


def test_a_build_that_finished_no_shard_leaves_nothing(texts, source, tmp_path):
    wrong_key = Corpus(texts.inputs, text_key="content")
    with pytest.raises(InputError, match='expected a JSON object with a "content" key'):
        build_dataset(wrong_key, str(source), tmp_path / "out", Options(slice_bytes=SMALL))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_fails_by_file_and_line_or_is_counted(texts, source, tmp_path, workers):
    bad = [*LINES[:30], '{"text": ', *LINES[30:], '{"txt": "a"}', '{"text": "\\ud800"}']
    (tmp_path / "bad.jsonl").write_text("\n".join(bad))
    corpus = Corpus([str(tmp_path / "bad.jsonl")])
    options = Options(workers=workers, slice_bytes=SMALL)
    with pytest.raises(InputError, match=r"bad.jsonl, line 31: is no JSON"):
        build_dataset(corpus, str(source), tmp_path / "out", options)
    assert not (tmp_path / "out.json").exists()
    skipping = Options(workers=workers, slice_bytes=SMALL, skip_faults=True)
    record = build_dataset(corpus, str(source), tmp_path / "out", skipping)
    assert record["skipped_documents"]["count"] == 3
    assert [fault.partition(": ")[0].split()[-1] for fault in record["skipped_documents"]["first"]] == [
        "31",
        "42",
        "43",
    ]
    (tmp_path / "good.jsonl").write_text("\n".join(LINES))
    build_dataset(Corpus([str(tmp_path / "good.jsonl")]), str(source), tmp_path / "good")
    assert same(tmp_path / "out", tmp_path / "good")


def test_two_builds_of_one_output(texts, source, tmp_path):
    (tmp_path / "out.parts").mkdir()
    with locked(tmp_path / "out.parts"), pytest.raises(InputError, match="being built by another process"):
        build_dataset(texts, str(source), tmp_path / "out")


def test_changed_text_or_settings_make_new_shards(texts, source, tmp_path, monkeypatch):
    written = []
    write = shards._Writer.write
    monkeypatch.setattr(shards._Writer, "write", lambda *arguments: written.append(1) or write(*arguments))
    monkeypatch.setattr("training.build_dataset.merge", interrupted)
    small = Options(slice_bytes=SMALL)

    def shards_made(options=small):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            build_dataset(texts, str(source), tmp_path / "out", options)
        return len(written)

    count = shards_made()
    assert count > 10
    assert shards_made() == 0
    assert shards_made(Options(slice_bytes=SMALL, append_eod=False)) == count
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert shards_made() > 0


def interrupted(*arguments):
    raise KeyboardInterrupt


def kill_when(condition: Callable, command: list[str], environment: dict[str, str]) -> None:
    """Start a build and kill it while its workers do nothing, and wait until they have ended."""
    process = psutil.Popen(command, env=environment)
    deadline = time.monotonic() + LONGEST
    while not condition(process):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = process.children()
    for worker in workers:
        worker.suspend()
    process.kill()
    process.wait()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.resume()
    _, left = psutil.wait_procs(workers, LONGEST)
    assert left == []


def test_killed_build_goes_on(source, tmp_path):
    """kill -9 of the job: its workers die with it, finished shards are kept, the end is the same."""
    with (tmp_path / "text.jsonl").open("w") as file:
        for number in range(80):
            file.write(json.dumps({"text": f"{number} and so on; " * 4000}) + "\n")
    job = {
        "inputs": [str(tmp_path / "text.jsonl")],
        "tokenizer": str(source),
        "output": str(tmp_path / "killed"),
        "workers": 2,
        "slice_bytes": 50_000,
        "report": str(tmp_path / "report.json"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "bridge.job", "training.build_dataset", str(tmp_path / "job.json")]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    parts = tmp_path / "killed.parts"

    # workers that have just been started, beside Python's tracker of what they share, end too
    kill_when(lambda process: len(process.children()) > 2, command, environment)
    assert not list(parts.glob("*.npz"))
    kill_when(lambda process: list(parts.glob("*.npz")), command, environment)
    assert 0 < len(list(parts.glob("*.npz"))) < 80
    with locked(parts, "is still being written"):
        assert not (tmp_path / "killed.json").exists()
    assert subprocess.run(command, env=environment).returncode == 0
    build_dataset(Corpus(job["inputs"]), str(source), tmp_path / "whole")
    assert same(tmp_path / "killed", tmp_path / "whole")
    assert not parts.exists()
