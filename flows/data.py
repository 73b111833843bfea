"""`bridgeworks data`: the command's own options; each command imports what it needs itself."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.local_path import read_here, written_here
from flows.options import Json

app = typer.Typer(
    help="Build, look at and adopt datasets of tokens.", rich_markup_mode="markdown", no_args_is_help=True
)


class OnError(StrEnum):
    """What a document that cannot be used does to a build."""

    FAIL = "fail"
    SKIP = "skip"


class Format(StrEnum):
    """How documents lie in a file."""

    JSONL = "jsonl"
    PARQUET = "parquet"
    TEXT = "text"


Tokenizer = Annotated[
    Path,
    typer.Option(metavar="FOLDER", help="Hugging Face folder with the tokenizer.", parser=read_here),
]


@app.command()
def build(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Files, folders, globs or URLs (s3://...) of text."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="PREFIX",
            help="Writes PREFIX.bin, .idx and .json; with --split a folder with train, valid and test.",
            parser=written_here,
        ),
    ],
    tokenizer: Tokenizer,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,N",
            help="Shares of train, valid and test, such as 98,1,1; each document goes to one of them.",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one a core")] = None,
    text_key: Annotated[
        str, typer.Option(help="Key of a JSON line, or column of Parquet, that holds the text.")
    ] = "text",
    append_eod: Annotated[
        bool, typer.Option(help="End every document with the tokenizer's end-of-text token.")
    ] = True,
    format: Annotated[
        Format | None, typer.Option(help="What the files are.", show_default="by their suffix")
    ] = None,
    on_error: Annotated[
        OnError, typer.Option(help="Stop at a document that cannot be used, or leave it out and count it.")
    ] = OnError.FAIL,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out files and folders of this name; may be repeated.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Read no more bytes of text than this.")
    ] = None,
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
