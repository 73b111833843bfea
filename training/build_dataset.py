"""The job that turns text into Megatron indexed datasets, one per split.

The output folder holds `train`, `valid` and `test` (`.bin`, `.idx`) and `dataset.json` with counts and
digests. The same text, tokenizer and split give the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bridge.errors import CheckpointError, ConfigError, InputError
from training.corpus import Corpus

SPLITS = ("train", "valid", "test")
BATCH = 256  # documents tokenised at a time, in the tokenizer's own threads


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Build the datasets of the job's config and return what `dataset.json` says."""
    corpus = Corpus(config["inputs"], config.get("exclude", []), config.get("max_bytes"))
    return build_dataset(corpus, config["tokenizer"], Path(config["output"]), config["split"])


def build_dataset(corpus: Corpus, tokenizer_path: str, output: Path, split: list[float]) -> dict[str, Any]:
    """Tokenise `corpus` into `output`, its documents divided by the three fractions of `split`."""
    if (output / "dataset.json").exists():
        raise InputError(f"{output} already holds a dataset: remove it or choose another folder")
    tokenizer = load_tokenizer(tokenizer_path)
    split_of = _divide(corpus.documents(), split)
    output.mkdir(parents=True, exist_ok=True)
    writers = {name: _SplitWriter(output / name, len(tokenizer)) for name in sorted(set(split_of.values()))}
    for number, (document, tokens) in enumerate(_tokenised(corpus.documents(), tokenizer), start=1):
        writers[split_of[_digest(document)]].add(tokens)
        if number % 1000 == 0:
            print(f"tokenised {number} documents", flush=True)
    record: dict[str, Any] = {
        "splits": {name: writer.finish() for name, writer in writers.items()},
        "tokenizer": _fingerprint(Path(tokenizer_path)),
        "vocab_size": len(tokenizer),
        "eod": tokenizer.eos_token_id,
    }
    (output / "dataset.json").write_text(
        json.dumps(record, indent=1, sort_keys=True) + "\n"
    )  # last: the seal
    return record


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local Hugging Face folder; it must name an end-of-sequence token."""
    if not Path(path).is_dir():
        raise CheckpointError(f"no such tokenizer folder: {path}")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer in {path} has no eos_token, which must end every document")
    return tokenizer


def _divide(documents: Iterable[str], split: list[float]) -> dict[str, str]:
    """Assign each document, by its digest, to a split.

    Sorting by digest makes the held-out documents a random choice that does not depend on the order of the
    files, and puts a repeated document into one split only.
    """
    if len(split) != len(SPLITS) or min(split) < 0 or abs(sum(split) - 1) > 1e-6:
        raise ConfigError(
            f"split is {split}: give three fractions for train, valid and test that add up to 1"
        )
    digests = sorted({_digest(document) for document in documents})
    held_out = [max(1, round(len(digests) * fraction)) if fraction else 0 for fraction in split[1:]]
    if sum(held_out) >= len(digests):
        raise InputError(f"{len(digests)} different documents are too few for the split {split}")
    names = ["valid"] * held_out[0] + ["test"] * held_out[1]
    return dict(zip(digests, names + ["train"] * (len(digests) - len(names)), strict=True))


def _tokenised(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[int]]]:
    while batch := list(islice(documents, BATCH)):
        # verbose=False: without it every document longer than the model's context is a warning
        ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        yield from (
            (text, [*tokens, tokenizer.eos_token_id]) for text, tokens in zip(batch, ids, strict=True)
        )


class _SplitWriter:
    """Writes the documents of one split through Megatron's own builder."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = str(prefix)
        dtype = DType.optimal_dtype(vocab_size)
        self.builder = IndexedDatasetBuilder(get_bin_path(self.prefix), dtype=dtype)
        self.documents = self.tokens = 0

    def add(self, tokens: list[int]) -> None:
        self.builder.add_document(torch.tensor(tokens), [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self) -> dict[str, Any]:
        """Write the index and return counts and digests."""
        self.builder.finalize(get_idx_path(self.prefix))
        files = [Path(get_bin_path(self.prefix)), Path(get_idx_path(self.prefix))]
        digests = {file.name: _file_digest(file) for file in files}
        return {"documents": self.documents, "tokens": self.tokens, "sha256": digests}


def _digest(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(folder: Path) -> dict[str, str]:
    """Return the digests of the files that make up a tokenizer."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
    return {name: _file_digest(folder / name) for name in names if (folder / name).is_file()}
