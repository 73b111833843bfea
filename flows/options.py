"""Options that several commands have, and the long ones of `compare`, `data build` and `train`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.local_path import read_here, written_here

RECIPES_OWN = "the recipe's"


class Gate(StrEnum):
    """The gates of `compare`."""

    CONFIG = "config"
    TENSORS = "tensors"
    LOGITS = "logits"


class OnError(StrEnum):
    """What a document that cannot be used does to a build."""

    FAIL = "fail"
    SKIP = "skip"


class Format(StrEnum):
    """How documents lie in a file."""

    JSONL = "jsonl"
    PARQUET = "parquet"
    TEXT = "text"


def size(option: str, most: int, help: str, **more: Any) -> Any:
    """Return the option for a parallel size of 1 to `most`."""
    return typer.Option(option, min=1, max=most, help=help, **more)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead, for scripts.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change one setting, by dotted name; may be repeated."),
]

# of `compare`: how a Megatron end is laid out, what both ends are asked, what is kept
Tensor = Annotated[int, size("--tp", 64, "Ranks that share each layer of a Megatron end.")]
Pipeline = Annotated[int, size("--pp", 256, "Stages that share its layers.")]
Expert = Annotated[int, size("--ep", 1024, "Ranks that share its experts.")]
CompareDtypes = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype", help="float32 (default) or bfloat16; the thresholds follow from it. May be repeated."
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A .json file of lists of token ids, or a text file with a prompt a line.",
        parser=read_here,
    ),
]
NumPrompts = Annotated[int, typer.Option(min=1, help="Random prompts, without --prompts.")]
PromptLength = Annotated[int, typer.Option(min=2, help="Tokens of each random prompt.")]
Only = Annotated[Gate | None, typer.Option(help="Leave out the other gates.")]
CompareConfigFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="A folder that describes the model of ends of Megatron-LM.",
        show_default="the other end",
        parser=read_here,
    ),
]
CompareFamily = Annotated[
    str | None, typer.Option(help="Or their model_type: their arguments describe the rest.")
]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Write the verdicts to this .json file, or with all tables to this folder.",
        parser=written_here,
    ),
]
Picture = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw the differences by position and by layer to this PNG.",
        parser=written_here,
    ),
]

# of `export`: what describes a checkpoint of plain Megatron-LM
ExportConfigFrom = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Take config and tokenizer from this folder.", parser=read_here),
]
ExportFamily = Annotated[
    str | None, typer.Option(help="The model_type of a checkpoint of Megatron-LM, for its config.")
]

# of `data build`: what is read, how it is cut into documents, what is written
Inputs = Annotated[
    list[str],
    typer.Argument(metavar="INPUT", help="Files, folders, globs or URLs (s3://...) of text."),
]
DataOutput = Annotated[
    Path,
    typer.Option(
        metavar="PREFIX",
        help="Writes PREFIX.bin, .idx and .json; with --split a folder with train, valid and test.",
        parser=written_here,
    ),
]
Tokenizer = Annotated[
    Path,
    typer.Option(metavar="FOLDER", help="Hugging Face folder with the tokenizer.", parser=read_here),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,N",
        help="Shares of train, valid and test, such as 98,1,1; each document goes to one of them.",
    ),
]
BuildWorkers = Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one a core")]
TextKey = Annotated[str, typer.Option(help="Key of a JSON line, or column of Parquet, that holds the text.")]
AppendEod = Annotated[bool, typer.Option(help="End every document with the tokenizer's end-of-text token.")]
DocumentFormat = Annotated[
    Format | None, typer.Option(help="What the files are.", show_default="by their suffix")
]
OnUnusable = Annotated[
    OnError, typer.Option(help="Stop at a document that cannot be used, or leave it out and count it.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Leave out files and folders of this name; may be repeated.")
]
MaxBytes = Annotated[int | None, typer.Option(min=1, help="Read no more bytes of text than this.")]

# of a training job
TrainOutput = Annotated[
    Path,
    typer.Option(
        "--output",
        metavar="FOLDER",
        help="Folder of the run; what it holds already is gone on with.",
        parser=written_here,
    ),
]
TrainLoad = Annotated[
    Path | None,
    typer.Option(
        "--load",
        metavar="FOLDER",
        help="Start from this Megatron or Hugging Face folder's weights and model.",
        parser=read_here,
    ),
]
TrainTensor = Annotated[
    int | None,
    size("--tp", 64, "Ranks that share each layer (tensor parallel).", show_default=RECIPES_OWN),
]
TrainPipeline = Annotated[
    int | None, size("--pp", 256, "Stages that share the layers (pipeline).", show_default=RECIPES_OWN)
]
TrainContext = Annotated[
    int | None, size("--cp", 64, "Ranks that share each sequence (context).", show_default=RECIPES_OWN)
]
TrainExpert = Annotated[
    int | None,
    size(
        "--ep",
        1024,
        "Ranks that share the experts, of those that --tp, --cp and --dp make.",
        show_default=RECIPES_OWN,
    ),
]
TrainExpertTensor = Annotated[
    int | None,
    size("--etp", 64, "Ranks that share each expert.", show_default="the recipe's, or as --tp"),
]
TrainData = Annotated[int, size("--dp", 4096, "Copies of the model: ranks are TP x PP x CP x DP.")]

TrainDataset = Annotated[
    Path | None,
    typer.Option(
        help='What `data build` made; several by --set \'dataset.blend=[0.7,"a",0.3,"b"]\'.'
        " Without any, the recipes for pretraining read made-up sequences.",
        metavar="PREFIX",
        parser=read_here,
    ),
]
Grace = Annotated[
    int,
    typer.Option(
        min=1,
        max=3600,
        metavar="SECONDS",
        help="How long a job that is told to stop may take to end its iteration and save, before it is"
        " killed.",
    ),
]
MaxRestarts = Annotated[
    int, typer.Option(min=0, help="Restarts after crashes in a row that bring no new checkpoint.")
]

Workers = Annotated[int, typer.Option(min=1, help="Threads that copy.")]
MaxMemory = Annotated[str, typer.Option(help="The most memory to take, such as 500MB or 2GiB.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Cast the weights: float32, bfloat16 or float16.", show_default="as they are"),
]
