"""Speed of `bridgeworks data build`, measured against a plain loop with Megatron's own builder.

    python -m training.benchmark_data [TOKENIZER INPUT...] [--megabytes 20] [--workers 1 2]

Without arguments the text is the source of Python's standard library, and the tokenizer one that is trained
on it first. The last line of output is one JSON document.
"""

import argparse
import json
import os
import resource
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from training.corpus import Corpus

VOCAB_SIZE = 8192

# Workers import this module, as the program's main one, and would wait for torch: functions import it.


def plain_build(texts: Iterable[str], tokenizer: Any, prefix: Path, *, append_eod: bool = True) -> int:
    """Write the indexed dataset `prefix` document by document and return its number of tokens."""
    import torch
    from megatron.core.datasets.indexed_dataset import (
        DType,
        IndexedDatasetBuilder,
        get_bin_path,
        get_idx_path,
    )

    dtype = DType.optimal_dtype(len(tokenizer))
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=dtype)
    total = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id] if append_eod else ids
        builder.add_document(torch.tensor(ids), [len(ids)])
        total += len(ids)
    builder.finalize(get_idx_path(str(prefix)))
    return total


def main() -> None:
    """Copy the text to one JSONL file, build it in each way, compare the bytes and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tokenizer", nargs="?", help="Hugging Face folder with the tokenizer")
    parser.add_argument("inputs", nargs="*", help="files or folders of text")
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    corpus = corpus_of(arguments.inputs, arguments.megabytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = arguments.tokenizer or make_tokenizer(corpus, folder / "tokenizer")
        results = measure(folder, tokenizer, corpus, arguments.workers)
    print(json.dumps(results))


def corpus_of(inputs: list[str], megabytes: float) -> Corpus:
    """Return so much text of the inputs; without any, of what every machine has."""
    library = sysconfig.get_paths()["stdlib"]
    # its tests hold files that are no UTF-8 on purpose
    exclude = [] if inputs else ["site-packages", "test", "tests"]
    return Corpus(inputs or [library], exclude, max_bytes=int(megabytes * 1e6))


def make_tokenizer(corpus: Corpus, folder: Path) -> str:
    """Train a tokenizer on the text; return its folder."""
    from training.make_checkpoint import train_tokenizer

    train_tokenizer(corpus, VOCAB_SIZE).save_pretrained(folder)
    return str(folder)


def measure(folder: Path, tokenizer_path: str, gathered: Corpus, workers: list[int]) -> dict[str, Any]:
    """Return documents and tokens a second of each way, all below `folder`."""
    import megatron.core.datasets.indexed_dataset  # noqa: F401 - its import is no part of the times

    from training.build_dataset import Options, build_dataset, load_tokenizer

    text = folder / "text.jsonl"
    lines = (json.dumps({"text": document}) + "\n" for document in gathered.documents())
    text.write_text("".join(lines))
    corpus = Corpus([str(text)])
    documents = sum(1 for _ in corpus.documents())
    tokenizer = load_tokenizer(tokenizer_path)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the plain loop gives it one text at a time anyway
    tokens = 0

    def plain() -> None:
        nonlocal tokens
        tokens = plain_build(corpus.documents(), tokenizer, folder / "plain")

    times = {"plain loop": timed(plain)}
    for count in workers:
        output = folder / f"with {count}"
        options = Options(workers=count)
        times[f"{count} workers"] = timed(
            lambda to=output, by=options: build_dataset(corpus, tokenizer_path, to, by)  # type: ignore[misc]
        )
        for suffix in (".bin", ".idx"):
            assert output.with_suffix(suffix).read_bytes() == (folder / f"plain{suffix}").read_bytes()
    rates = {
        name: {
            "seconds": round(seconds, 2),
            "processor_seconds": round(used, 2),
            "documents_per_second": round(documents / seconds),
            "tokens_per_second": round(tokens / seconds),
        }
        for name, (seconds, used) in times.items()
    }
    return {"documents": documents, "tokens": tokens, "bytes": text.stat().st_size, **rates}


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that passed and those of the processor, which other programs disturb less."""
    started, used = time.perf_counter(), processor_seconds()
    action()
    return time.perf_counter() - started, processor_seconds() - used


def processor_seconds() -> float:
    spent = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


if __name__ == "__main__":
    main()
