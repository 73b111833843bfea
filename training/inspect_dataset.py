"""A look at indexed datasets: counts, the first documents, digests; and a record for those from elsewhere."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bridge.errors import CheckpointError, InputError
from bridge.job import write_json
from training.dataset_record import FORMAT, Dataset, find_dataset, record_path, tokenizer_files, verify
from training.indexed_files import bin_path, idx_path, open_indexed
from training.slices import file_digest

SHOWN_TOKENS = 64


def inspect(path: Path, *, documents: int, tokenizer: Path | None, check_digests: bool) -> dict[str, Any]:
    """Return the counts of a dataset's splits, their first documents, and what is wrong with the files.

    The documents are text with a `tokenizer`, which must be the one that made them, and token ids without.
    """
    dataset = find_dataset(path)
    text = _tokenizer_of(dataset, tokenizer) if tokenizer else None
    splits = {}
    for name, record in dataset.record["splits"].items():
        if dataset.name in (None, name):
            counts = {key: record[key] for key in ("documents", "tokens", "bytes")}
            splits[name] = {**counts, "first": first_documents(dataset.folder / name, documents, text)}
    record = dataset.record
    about = {key: record[key] for key in ("vocab_size", "eod", "append_eod", "dtype")}
    skipped = record["skipped_documents"]["count"]
    about |= {"inputs": len(record["inputs"]), "blank": record["blank_documents"], "skipped": skipped}
    problems = verify(dataset) if check_digests else None
    return {"splits": splits, **about, "problems": problems}


def first_documents(prefix: Path, count: int, tokenizer: Tokenizer | None) -> list[Any]:
    """Return the beginnings of the first documents."""
    files = open_indexed(prefix)
    beginnings = [
        files.document(each)[:SHOWN_TOKENS].tolist() for each in range(min(count, len(files.lengths)))
    ]
    return (
        [tokenizer.decode(each, skip_special_tokens=False) for each in beginnings]
        if tokenizer
        else beginnings
    )


def adopt(prefix: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """Write the record of .bin and .idx files that another program made with this tokenizer."""
    if (record_file := record_path(prefix, is_folder=False)).exists():
        raise InputError(f"{record_file} exists already: the dataset has its record")
    tokenizer, eod = _load(tokenizer_folder), _eod(tokenizer_folder)
    files = open_indexed(prefix)
    vocab_size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(eod)
    if not len(files.tokens):
        raise InputError(f"{prefix} holds no tokens")
    if (largest := int(files.tokens.max())) >= vocab_size or int(files.tokens.min()) < 0:
        raise InputError(
            f"{prefix} holds tokens up to {largest}, the tokenizer in {tokenizer_folder} has {vocab_size}:"
            " name the one that the files were made with"
        )
    written = files.lengths > 0
    last = files.tokens[(files.offsets[written] // files.tokens.itemsize) + files.lengths[written] - 1]
    record = {
        "format": FORMAT,
        "splits": {
            prefix.name: {
                "documents": len(files.lengths),
                "tokens": len(files.tokens),
                "bytes": None,
                "sha256": {
                    path.name: file_digest(str(path)) for path in (bin_path(prefix), idx_path(prefix))
                },
            }
        },
        "tokenizer": tokenizer_files(tokenizer_folder),
        "vocab_size": vocab_size,
        "eod": end,
        "append_eod": bool((last == end).all()),
        "dtype": files.tokens.dtype.str,
        "blank_documents": 0,
        "skipped_documents": {"count": 0, "first": []},
        "inputs": [],
    }
    write_json(record_file, record)
    return record


def _tokenizer_of(dataset: Dataset, folder: Path) -> Tokenizer:
    if tokenizer_files(folder) != dataset.record["tokenizer"]:
        raise InputError(f"the tokenizer in {folder} is not the one that {dataset.folder} was made with")
    return _load(folder)


def _load(folder: Path) -> Tokenizer:
    if not (file := folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json")
    return Tokenizer.from_file(str(file))


def _eod(folder: Path) -> str:
    """Return the end-of-sequence token that the tokenizer's config names."""
    try:
        token = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} has no tokenizer_config.json that names an eos_token") from error
    return token["content"] if isinstance(token, dict) else token
