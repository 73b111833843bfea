"""`bridgeworks data`; each command imports what it needs itself."""

from pathlib import Path
from typing import Annotated

import typer

from flows.local_path import read_here, written_here
from flows.options import (
    AppendEod,
    BuildWorkers,
    DataOutput,
    DocumentFormat,
    Exclude,
    Inputs,
    Json,
    MaxBytes,
    OnError,
    OnUnusable,
    Split,
    TextKey,
    Tokenizer,
)

app = typer.Typer(
    help="Build, look at and adopt datasets of tokens.", rich_markup_mode="markdown", no_args_is_help=True
)


@app.command()
def build(
    inputs: Inputs,
    output: DataOutput,
    tokenizer: Tokenizer,
    split: Split = None,
    workers: BuildWorkers = None,
    text_key: TextKey = "text",
    append_eod: AppendEod = True,
    format: DocumentFormat = None,
    on_error: OnUnusable = OnError.FAIL,
    exclude: Exclude = None,
    max_bytes: MaxBytes = None,
    json: Json = False,
) -> None:
    """Turn text (JSONL, Parquet, also .gz and .zst, or plain) into a Megatron indexed dataset, in parallel.

    Started again after it was stopped or killed, it goes on.

    Example: `bridgeworks data build corpus/*.jsonl --output data/corpus --tokenizer llama-1b --split
    98,1,1`, then `bridgeworks train ... --dataset data/corpus`
    """
    from flows.build_data import build_data

    settings = {
        "inputs": inputs,
        "exclude": exclude or [],
        "max_bytes": max_bytes,
        "text_key": text_key,
        "format": format,
        "append_eod": append_eod,
        "on_error": on_error,
        "workers": workers,
    }
    build_data(settings, output, tokenizer, split, as_json=json)


@app.command()
def inspect(
    dataset: Annotated[
        Path,
        typer.Argument(metavar="PREFIX", help="Prefix of a dataset or folder of splits.", parser=read_here),
    ],
    documents: Annotated[int, typer.Option(min=0, help="Show so many documents of each split.")] = 2,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Show their text with this tokenizer, not token ids.", parser=read_here
        ),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Read the files and compare their digests.")] = True,
    json: Json = False,
) -> None:
    """Show what a dataset holds and check its files; exit code 1 if one is not what its record says.

    Example: `bridgeworks data inspect data/corpus --tokenizer llama-1b`
    """
    from flows.build_data import show_data

    if show_data(dataset, documents, tokenizer, verify, as_json=json):
        raise typer.Exit(1)


@app.command()
def adopt(
    prefix: Annotated[
        Path, typer.Argument(metavar="PREFIX", help="Of .bin and .idx files.", parser=written_here)
    ],
    tokenizer: Tokenizer,
    json: Json = False,
) -> None:
    """Describe an indexed dataset that another program made, such as Megatron's preprocess_data.py.

    Writes PREFIX.json, without which no run reads it. Example: `bridgeworks data adopt data/old_text_document
    --tokenizer llama-1b`
    """
    from flows.console import print_json
    from training.inspect_dataset import adopt as write_record

    record = write_record(prefix, tokenizer)
    counts = record["splits"][prefix.name]
    if json:
        print_json(record)
    else:
        print(f"{prefix}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
