"""`bridgeworks data`, as a shell sees it."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

PROGRAM = str(Path(sys.executable).with_name("bridgeworks"))
TEXTS = [f"the document number {number}" for number in range(30)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=240, env=environment
    )


def check_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    # in front of it progress may be told, when the machine is slow
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert all(word in result.stderr for word in words), result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer of whole words, text, and a dataset built of it."""
    folder = tmp_path_factory.mktemp("data")
    words = ["<unk>", "<end>", "the", "document", "number", *map(str, range(30))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "unk_token": "<unk>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    lines = "".join(json.dumps({"content": text}) + "\n" for text in TEXTS)
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    built = run(*build(folder, "words"), "--text-key", "content", "--json")
    assert built.returncode == 0, built.stderr
    report = json.loads(built.stdout)
    assert (report["splits"]["words"]["documents"], report["splits"]["words"]["tokens"]) == (30, 150)
    return folder


def build(folder: Path, name: str, text: str = "text.jsonl.gz") -> tuple[object, ...]:
    tokenizer = ("--tokenizer", folder / "tokenizer")
    return ("data", "build", folder / text, "--output", folder / name, *tokenizer)


def test_inspect_shows_text_and_finds_damage(folder, tmp_path):
    shown = run("data", "inspect", folder / "words", "--tokenizer", folder / "tokenizer", "--documents", "1")
    assert shown.returncode == 0, shown.stderr
    assert "'the document number 0 <end>'" in shown.stdout
    assert "every file is as the record says" in shown.stdout
    for kind in ("bin", "idx", "json"):
        shutil.copy(folder / f"words.{kind}", tmp_path)
    with (tmp_path / "words.bin").open("r+b") as file:
        file.write(b"\x05")
    damaged = run("data", "inspect", tmp_path / "words", "--json")
    assert damaged.returncode == 1
    assert [problem.split()[0] for problem in json.loads(damaged.stdout)["problems"]] == [
        f"{tmp_path}/words.bin"
    ]
    assert run("data", "inspect", tmp_path / "words", "--no-verify").returncode == 0
    with (tmp_path / "words.bin").open("ab") as file:
        file.write(b"\x05")
    check_refused(run("data", "inspect", tmp_path / "words"), "words.bin has 301 bytes, its index says 300")


def test_adopt_says_what_build_said(folder, tmp_path):
    for kind in ("bin", "idx"):
        shutil.copy(folder / f"words.{kind}", tmp_path)
    check_refused(run("data", "inspect", tmp_path / "words"), "is no complete dataset", "data adopt")
    adopted = run("data", "adopt", tmp_path / "words", "--tokenizer", folder / "tokenizer", "--json")
    assert adopted.returncode == 0, adopted.stderr
    record, built = json.loads(adopted.stdout), json.loads((folder / "words.json").read_text())
    for key in ("tokenizer", "vocab_size", "eod", "append_eod", "dtype"):
        assert record[key] == built[key]
    for key in ("documents", "tokens", "sha256"):
        assert record["splits"]["words"][key] == built["splits"]["words"][key]
    check_refused(
        run("data", "adopt", tmp_path / "words", "--tokenizer", folder / "tokenizer"), "exists already"
    )


def test_splits_and_skipped_lines(folder):
    lines = [*(json.dumps({"text": text}) for text in TEXTS), "{"]
    (folder / "bad.jsonl").write_text("\n".join(lines))
    check_refused(run(*build(folder, "bad", "bad.jsonl")), "bad.jsonl, line 31: is no JSON")
    built = run(*build(folder, "bad", "bad.jsonl"), "--on-error", "skip", "--split", "8,1,1")
    assert built.returncode == 0, built.stderr
    assert "left out 1 documents" in built.stderr
    record = json.loads((folder / "bad" / "dataset.json").read_text())
    assert {name: split["documents"] for name, split in record["splits"].items()} == {
        "train": 24,
        "valid": 3,
        "test": 3,
    }


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("none.jsonl", (), ("no such text file or folder",)),
        ("text.jsonl.gz", (), ("line 1", 'expected a JSON object with a "text" key')),
        ("text.jsonl.gz", ("--split", "most"), ("--split is 'most'",)),
        ("text.jsonl.gz", ("--text-key", "content", "--split", "0,1,1"), ("up to three shares",)),
        ("text.jsonl.gz", ("--text-key", "content", "--split", "9,-1,2"), ("up to three shares",)),
    ],
)
def test_mistakes_are_named(folder, text, options, words):
    check_refused(run(*build(folder, "refused", text), *options), *words)
    assert not list(folder.glob("refused*"))
