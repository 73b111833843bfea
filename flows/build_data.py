"""What `bridgeworks data` does: the job that builds a dataset, and a look at one."""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.errors import InputError
from flows.console import Progress, print_json, print_table, progress
from tasks.launch import launch
from training.blend import SPLITS
from training.corpus import Corpus
from training.dataset_record import record_path

SECONDS_BETWEEN_READS = 0.5


def build_data(
    settings: dict[str, Any], output: Path, tokenizer: Path, split: str | None, *, as_json: bool
) -> None:
    """Build a dataset in a job of its own and show its counts."""
    fractions = parse_fractions(split) if split else None
    if (record := record_path(output, bool(split))).exists():
        raise InputError(f"{output} already holds a dataset: remove {record} and its files or name another")
    inputs = [each if "://" in each else str(Path(each).absolute()) for each in settings["inputs"]]
    check_inputs({**settings, "inputs": inputs})
    paths = {"inputs": inputs, "output": str(output.absolute()), "tokenizer": str(tokenizer.absolute())}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, progress("tokenising") as show:
        told = Path(folder, "progress.json")
        job = {**settings, **paths, "split": fractions, "progress": str(told)}
        report = launch("training.build_dataset", job, folder=Path(folder), on_tick=follow(told, show))
    report["seconds"] = round(time.monotonic() - started, 2)
    print_json(report) if as_json else print_counts(report, output)


def check_inputs(settings: dict[str, Any]) -> None:
    """Refuse mistyped files and keys at once: the job reads all files before their first document."""
    names = ("inputs", "exclude", "max_bytes", "text_key", "format")
    corpus = Corpus(**{name: settings[name] for name in names})
    list(corpus.files())
    if settings["on_error"] == "fail":
        next(corpus.documents(), None)


def parse_fractions(split: str) -> list[float]:
    """Return the fractions of train, valid and test from shares as `dataset.split` has them: "98,1,1"."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if (
        not 1 <= len(shares) <= len(SPLITS)
        or not all(0 <= share < math.inf for share in shares)
        or not shares[0]
    ):
        raise InputError(
            f"--split is {split!r}: give up to three shares, for train, valid and test, such as 98,1,1"
        )
    return [share / sum(shares) for share in [*shares, 0.0, 0.0][: len(SPLITS)]]


def follow(told: Path, show: Progress) -> Callable[[], None]:
    """Return a function that, called often, shows now and then how far the job is."""
    state = {"next": 0.0}

    def tick() -> None:
        if time.monotonic() >= state["next"] and told.is_file():
            state["next"] = time.monotonic() + SECONDS_BETWEEN_READS
            values = json.loads(told.read_text())
            show(values["done"], values["total"])

    return tick


def print_counts(report: dict[str, Any], output: Path) -> None:
    rows = [
        (name, f"{each['documents']:,}", f"{each['tokens']:,}", f"{each['bytes']:,}")
        for name, each in report["splits"].items()
    ]
    print_table(("dataset", "documents", "tokens", "bytes of text"), rows, title=str(output))
    print(f"from {report['inputs']} files in {report['seconds']:.1f} s")
    skipped = report["skipped_documents"]
    if skipped["count"]:
        print(
            f"left out {skipped['count']} documents; the first:",
            *skipped["first"],
            sep="\n  ",
            file=sys.stderr,
        )


def show_data(dataset: Path, documents: int, tokenizer: Path | None, verify: bool, *, as_json: bool) -> bool:
    """Show a dataset and say whether there is anything wrong with it."""
    from training.inspect_dataset import inspect

    found = inspect(dataset, documents=documents, tokenizer=tokenizer, check_digests=verify)
    if as_json:
        print_json(found)
        return bool(found["problems"])
    splits = found.pop("splits")
    rows = [(name, each["documents"], each["tokens"]) for name, each in splits.items()]
    print_table(("dataset", "documents", "tokens"), rows, title=str(dataset))
    problems = found.pop("problems")
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    for name, each in splits.items():
        for number, document in enumerate(each["first"]):
            print(f"{name}, document {number}: {document!r}")
    if problems is not None:
        print("\n".join(problems) or "every file is as the record says")
    return bool(problems)
