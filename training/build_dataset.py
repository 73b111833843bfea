"""The job that turns text into Megatron indexed datasets: one, or one a split, and a record beside it.

The text is cut into slices, workers tokenise them into shards, and the shards are put together in order. The
same text, tokenizer and settings give the same bytes, whatever the number of workers. A build that was killed
goes on from its finished shards. The record is written last: where there is one, the dataset is complete.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bridge.errors import BridgeworksError, CheckpointError, InputError
from bridge.folder_lock import locked
from bridge.job import die_with_parent, write_json
from training.corpus import Corpus, TextFile
from training.dataset_record import FORMAT, record_path, tokenizer_files
from training.indexed_files import token_dtype
from training.indexed_writer import SPLITS, Merged, check_split, merge
from training.shards import PARTIAL, Settings, read_shard, tokenise
from training.slices import SLICE_BYTES, Slice, cut, file_digest, keyed

PARTS = ".parts"
MERGED = "merged"
AHEAD = 4  # slices waiting for each worker
LINE_SECONDS = 10.0

Report = Callable[[int, int], None]
Map = Callable[[Callable[[Any], Any], list[Any]], Iterator[Any]]


@dataclass(frozen=True)
class Options:
    """How a dataset is built; only `workers` and `slice_bytes` have no influence on its bytes.

    `split` gives a folder of three datasets with these fractions of the documents, none a single prefix.
    """

    split: list[float] | None = None
    append_eod: bool = True
    skip_faults: bool = False
    workers: int = 1
    slice_bytes: int = SLICE_BYTES


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Build the dataset of the job's config; return its record, with the inputs' number for their list.

    "workers" is the number of cores to use, by default all; "progress" names a file that is told how far it
    has come, as {"done": bytes, "total": bytes}.
    """
    corpus = Corpus(
        config["inputs"],
        config.get("exclude", []),
        config.get("max_bytes"),
        config.get("text_key", "text"),
        config.get("format"),
    )
    options = Options(
        config.get("split"),
        config.get("append_eod", True),
        config.get("on_error", "fail") == "skip",
        config.get("workers") or len(os.sched_getaffinity(0)),
        config.get("slice_bytes", SLICE_BYTES),
    )
    record = build_dataset(
        corpus, config["tokenizer"], Path(config["output"]), options, _reporter(config.get("progress"))
    )
    return {**record, "inputs": len(record["inputs"])}


def build_dataset(
    corpus: Corpus,
    tokenizer_path: str,
    output: Path,
    options: Options | None = None,
    report: Report = lambda done, total: None,
) -> dict[str, Any]:
    """Tokenise `corpus` into the prefix `output`, or into a folder of splits, and return its record."""
    options = options or Options()
    if options.split:
        check_split(options.split)
    if (sealed := record_path(output, bool(options.split))).exists():
        raise InputError(f"{output} already holds a dataset: remove {sealed} and its files or name another")
    files = list(corpus.files())
    tokenizer = load_tokenizer(tokenizer_path)
    parts = output.with_name(output.name + PARTS)
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error}; name another output") from error
    with locked(parts, "is being built by another process: wait for it"), kept_if_useful(parts):
        settings = _prepare(parts, tokenizer, corpus, options)
        merged, digests = _build(files, corpus, settings, output.name, options, report)
        record = _record(merged, files, digests, tokenizer, settings, tokenizer_path)
        _seal(parts / MERGED, sealed, record)
        shutil.rmtree(parts)
    return record


@contextmanager
def kept_if_useful(parts: Path) -> Iterator[None]:
    """Remove the folder after an error if there is no finished shard in it to go on from."""
    try:
        yield
    except BaseException:
        if not any(parts.glob("*.npz")):  # what is written last of a shard
            shutil.rmtree(parts, ignore_errors=True)  # the error that led here is the one to tell
        raise


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local Hugging Face folder; it must name an end-of-sequence token."""
    if not Path(path).is_dir():
        raise CheckpointError(f"no such tokenizer folder: {path}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        found = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} has no tokenizer that transformers can load: {found}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer in {path} has no eos_token, which must end every document")
    if not tokenizer.is_fast:
        raise CheckpointError(f"the tokenizer in {path} has no form that the tokenizers library can run")
    return tokenizer


def _prepare(parts: Path, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, options: Options) -> Settings:
    """Give the workers what they need, and remove what a killed build was writing."""
    for left in parts.glob(f"*{PARTIAL}"):
        left.unlink()
    (parts / MERGED).mkdir(exist_ok=True)
    serialised = tokenizer.backend_tokenizer.to_str()
    settings = Settings(
        folder=str(parts),
        tokenizer_digest=hashlib.sha256(serialised.encode()).hexdigest()[:32],
        text_key=corpus.text_key,
        eod=tokenizer.eos_token_id if options.append_eod else None,
        dtype=token_dtype(len(tokenizer)).str,
        skip_faults=options.skip_faults,
        split_special_tokens=tokenizer.split_special_tokens,
        max_bytes=corpus.max_bytes,
    )
    settings.tokenizer.write_text(serialised)
    return settings


def _build(
    files: list[TextFile],
    corpus: Corpus,
    settings: Settings,
    name: str,
    options: Options,
    report: Report,
) -> tuple[Merged, dict[str, str]]:
    groups = list(cut(files, corpus.format, options.slice_bytes))
    with _workers(options.workers, len(groups)) as in_order:
        paths = list(dict.fromkeys(file.path for file in files))
        digests = dict(zip(paths, in_order(file_digest, paths), strict=True))
        slices = [keyed(pieces, digests, settings.digest) for pieces in groups]
        keys = _tokenise(slices, settings, in_order, report)
    if list(corpus.files()) != files:
        shutil.rmtree(settings.folder)  # shards may not be of the text that their names say
        raise InputError(f"the files of {', '.join(corpus.inputs)} were changed while they were read")
    names, split = (list(SPLITS), options.split) if options.split else ([name], [1.0])
    merged = merge(keys, settings, Path(settings.folder, MERGED), names, split)
    if not sum(each["documents"] for each in merged.splits.values()):
        raise InputError(f"no documents in {', '.join(corpus.inputs)}: every text is blank or left out")
    return merged, digests


def _tokenise(slices: list[Slice], settings: Settings, in_order: Map, report: Report) -> list[str]:
    """Make the shards of the slices, as far as the limit of text needs them, and return their keys."""
    keys: list[str] = []
    done, total = 0, sum(part.nbytes for part in slices)
    remaining = settings.max_bytes
    report(0, total)
    for part, key in zip(slices, in_order(partial(tokenise, settings=settings), slices), strict=False):
        keys.append(key)
        done += part.nbytes
        report(done, total)
        if remaining is not None:
            remaining -= int(read_shard(settings.folder, key).nbytes.sum())
            if remaining < 0:
                break
    return keys


@contextmanager
def _workers(cores: int, slices: int) -> Iterator[Map]:
    """Yield a map that works ahead in up to `cores` processes, in order; for one slice in this process."""
    processes = max(1, min(cores, slices))
    # read by the threads of the tokenizers library when they start, here or in a worker
    os.environ["RAYON_NUM_THREADS"] = str(cores // processes)
    if processes == 1:
        yield map
        return
    # not forked: this process has threads of torch and of the tokenizer
    spawn = multiprocessing.get_context("spawn")
    # one that is importing does not yet end with this process, and would go on with what is queued
    pool = ProcessPoolExecutor(processes, spawn, initializer=die_with_parent, initargs=(os.getpid(),))
    try:
        yield partial(_in_order, pool, processes * AHEAD)
    except BrokenProcessPool as error:
        raise BridgeworksError(
            "a worker was killed, perhaps for want of memory: start again, with fewer workers; what is"
            " finished is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, ahead: int, function: Callable[[Any], Any], items: list[Any]
) -> Iterator[Any]:
    pending: deque[Future[Any]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _record(
    merged: Merged,
    files: list[TextFile],
    digests: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    tokenizer_path: str,
) -> dict[str, Any]:
    """Say what the dataset is and what it was made of; nothing in it depends on time or machine."""
    return {
        "format": FORMAT,
        "splits": merged.splits,
        "tokenizer": tokenizer_files(Path(tokenizer_path)),
        "vocab_size": len(tokenizer),
        "eod": tokenizer.eos_token_id,
        "append_eod": settings.eod is not None,
        "dtype": settings.dtype,
        "text_key": settings.text_key,
        "max_bytes": settings.max_bytes,
        "blank_documents": merged.blank,
        "skipped_documents": {"count": merged.skipped, "first": merged.faults},
        "inputs": [{"path": file.path, "bytes": file.nbytes, "sha256": digests[file.path]} for file in files],
    }


def _seal(merged: Path, record_file: Path, record: dict[str, Any]) -> None:
    """Move the files to their place, and write the record when they are there."""
    record_file.parent.mkdir(parents=True, exist_ok=True)
    for file in (name for split in record["splits"].values() for name in split["sha256"]):
        (merged / file).replace(record_file.parent / file)
    beside = merged / record_file.name
    beside.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    beside.replace(record_file)


def _reporter(progress: str | None) -> Report:
    """Return a function that writes progress to the file, and now and then a line to the log."""
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if progress:
            write_json(Path(progress), {"done": done, "total": total})
        if (now := time.monotonic()) - last >= LINE_SECONDS:
            last = now
            rate = done / 1e6 / (now - started)
            print(
                f"tokenised {done / max(total, 1):.0%} of {total / 1e6:,.0f} MB, {rate:.1f} MB/s", flush=True
            )

    return report
