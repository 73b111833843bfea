"""The `bridgeworks` command. Each command imports what it needs itself, so that `--help` is quick."""

import errno
import gc
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from bridge.errors import BridgeworksError, StoppedError
from bridge.refused_files import refused_files
from flows import audit, data
from flows.local_path import read_here, written_here
from flows.options import (
    CompareConfigFrom,
    CompareDtypes,
    CompareFamily,
    Dtype,
    Expert,
    ExportConfigFrom,
    ExportFamily,
    Gate,
    Grace,
    Json,
    MaxMemory,
    MaxRestarts,
    NumPrompts,
    Only,
    Picture,
    Pipeline,
    PromptLength,
    Prompts,
    Report,
    Set,
    Tensor,
    TrainContext,
    TrainData,
    TrainDataset,
    TrainExpert,
    TrainExpertTensor,
    TrainLoad,
    TrainOutput,
    TrainPipeline,
    TrainTensor,
    Workers,
)

app = typer.Typer(
    help="From a Hugging Face checkpoint to a trained, verified and published successor.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(audit.app, name="audit")
app.add_typer(data.app, name="data")


SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The release spec, a YAML or JSON file.")]


def main() -> None:
    """Run the command: exit code 0 done, 1 a gate or a job failed, 2 bad input, 75 stopped and saved."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with refused_files():
            sys.exit(app(standalone_mode=False) or 0)
    except typer.TyperException as error:
        print(f"error: {_one_line(error.format_message())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BridgeworksError as error:
        print(f"{'stopped' if isinstance(error, StoppedError) else 'error'}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {_why_no_space(error)}", file=sys.stderr)
        sys.exit(1)
    except typer.Abort:
        sys.exit(130)
    finally:
        # Or Python would look through everything for garbage once more: 40 of the 220 ms of a short command.
        gc.freeze()


def _terminated(number: int, frame: Any) -> NoReturn:
    """Leave by an exception, so that the launcher lets a job save before it ends."""
    sys.exit(128 + number)


def _why_no_space(error: OSError) -> str:
    """Say that the disk is full, and what failed before: its record may be what found no space."""
    before = f"{error.__context__}; then " if isinstance(error.__context__, BridgeworksError) else ""
    where = f" for {error.filename}" if error.filename else ""
    return f"{before}no space was left{where}: free some and give the command again"


def _one_line(text: str) -> str:
    return " ".join(text.split())


@app.callback(invoke_without_command=True)
def show_version_or_help(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(f"bridgeworks {version_of('bridgeworks')}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    workspace: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="For the artifacts, logs and the spec.", parser=written_here),
    ] = Path("work"),
    changes: Set = None,
) -> None:
    """Run the whole job on a small model that is made here: fetch, import, train, verify, export, publish.

    Writes WORKSPACE/demo.yaml, a spec to edit and run again: `bridgeworks release work/demo.yaml`
    """
    from flows.demo import run_demo

    run_demo(workspace, changes or [])


@app.command()
def release(spec: SpecFile, changes: Set = None, json: Json = False) -> None:
    """Make a release: fetch, import, check, train, export, verify and publish, reusing what is unchanged.

    Example: `bridgeworks release model.yaml --set train.overrides.optimizer.lr=1e-5`
    """
    from flows.show_release import run_release
    from tasks.spec import load_spec

    run_release(load_spec(spec, changes), as_json=json)


@app.command()
def plan(spec: SpecFile, changes: Set = None, json: Json = False) -> None:
    """Show which steps of a release would run, and why, without running any.

    Example: `bridgeworks plan model.yaml --set train.overrides.train.train_iters=500`
    """
    from flows.console import print_json
    from flows.show_release import plan_rows, planned, print_plan
    from tasks.spec import load_spec

    loaded = load_spec(spec, changes)
    decisions = planned(loaded, here=False)
    print_json(plan_rows(loaded, decisions)) if json else print_plan(loaded, decisions)


@app.command("import")
def import_(
    hf: Annotated[
        str, typer.Argument(metavar="HF", help="A folder, s3://bucket/prefix or hf://org/name@revision.")
    ],
    megatron: Annotated[
        Path, typer.Argument(metavar="MEGATRON", help="The Megatron folder to write.", parser=written_here)
    ],
    dtype: Dtype = None,
    workers: Workers = 2,
    max_memory: MaxMemory = "1GiB",
    json: Json = False,
) -> None:
    """Turn a Hugging Face checkpoint into a Megatron one.

    Quantised weights (FP8, MXFP4) become what they stand for. One that was interrupted goes on.

    Example: `bridgeworks import hf://meta-llama/Llama-3.2-1B megatron/llama-1b`
    """
    from flows import convert

    convert.report(
        convert.import_from(hf, megatron, dtype=dtype, workers=workers, max_memory=max_memory), json
    )


@app.command()
def export(
    megatron: Annotated[
        Path,
        typer.Argument(metavar="MEGATRON", help="A Megatron folder, imported or trained.", parser=read_here),
    ],
    hf: Annotated[
        Path, typer.Argument(metavar="HF", help="The Hugging Face folder to write.", parser=written_here)
    ],
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one safetensors file.")] = "5GB",
    config_from: ExportConfigFrom = None,
    family: ExportFamily = None,
    dtype: Dtype = None,
    workers: Workers = 2,
    max_memory: MaxMemory = "1GiB",
    json: Json = False,
) -> None:
    """Turn a Megatron checkpoint, imported or trained, into a Hugging Face one.

    One that was interrupted goes on.

    Example: `bridgeworks export runs/llama/checkpoints llama-trained`
    """
    from flows import convert

    source = {"config_from": config_from, "family": family}
    options = {"dtype": dtype, "max_shard_size": max_shard_size, "workers": workers, "max_memory": max_memory}
    convert.report(convert.export_to(megatron, hf, **source, **options), json)


@app.command()
def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A Hugging Face or Megatron folder.", parser=read_here)
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", parser=read_here)],
    tp: Tensor = 1,
    pp: Pipeline = 1,
    ep: Expert = 1,
    dtype: CompareDtypes = None,
    prompts: Prompts = None,
    num_prompts: NumPrompts = 4,
    prompt_length: PromptLength = 64,
    only: Only = None,
    config_from: CompareConfigFrom = None,
    family: CompareFamily = None,
    report: Report = None,
    picture: Picture = None,
    json: Json = False,
) -> None:
    """Compare two checkpoints: every setting, every tensor bit for bit, logits and hidden states.

    Logits are compared at every position, hidden states at every layer, and the first layer at which the two
    part is named.

    Exit code 1 if a gate fails. Example: `bridgeworks compare llama-1b megatron/llama-1b --tp 2`
    """
    from flows import compare as comparison

    comparison.compare(
        a,
        b,
        comparison.settings_of(tp, pp, ep, prompts, num_prompts, prompt_length),
        dtypes=dtype or ["float32"],
        gates={only} if only else set(Gate),
        config_from=config_from,
        family=family,
        report=report,
        picture=picture,
        as_json=json,
    )


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="One that `bridgeworks recipes` lists.")],
    output: TrainOutput,
    load: TrainLoad = None,
    dataset: TrainDataset = None,
    tp: TrainTensor = None,
    pp: TrainPipeline = None,
    cp: TrainContext = None,
    ep: TrainExpert = None,
    etp: TrainExpertTensor = None,
    dp: TrainData = 1,
    max_restarts: MaxRestarts = 2,
    grace: Grace = 600,
    changes: Set = None,
    json: Json = False,
) -> None:
    """Train a recipe's model, or with --load that of a checkpoint, on the GPUs of this machine or its CPU.

    Ctrl-C and SIGTERM let it save and end with exit code 75; the same command then goes on. OUTPUT gets
    checkpoints/, metrics.jsonl and a folder with the log of each job. `bridgeworks recipes RECIPE` shows
    everything that --set can change.

    Example: `bridgeworks train continued_pretrain_config --load megatron/llama-1b --dataset data/code
    --output runs/llama --tp 2 --dp 4 --set train.train_iters=200`
    """
    from flows import train as training

    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
        "data_parallel_size": dp,
    }
    training.train(
        recipe,
        output,
        load=load,
        dataset=dataset,
        sizes=sizes,
        changes=changes or [],
        max_restarts=max_restarts,
        grace=grace,
        as_json=json,
    )


@app.command()
def families(json: Json = False) -> None:
    """List the model families that can be converted, and what the test suite holds each to.

    Checked are config.json both ways over every key, every tensor bit for bit there and back, and in each
    layout of two ranks weights bit for bit, gradients and logits in float32 against transformers.
    """
    from flows.families import show_families

    show_families(json)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Show this one's whole config.")
    ] = None,
    changes: Set = None,
    json: Json = False,
) -> None:
    """List the training recipes, or show the config that one returns.

    Example: `bridgeworks recipes llama32_1b_pretrain_config --set train.train_iters=500`
    """
    import yaml

    from flows.console import print_json, print_table
    from recipes.registry import all_recipes, recipe_named
    from training.overrides import apply_overrides

    if name is None:
        rows = [
            (each, _one_line(recipe.__doc__ or "").partition(". ")[0])
            for each, recipe in all_recipes().items()
        ]
        print_json(dict(rows)) if json else print_table(("recipe", "what it returns"), rows)
        return
    config = apply_overrides(recipe_named(name)(), changes or []).to_dict()
    print_json(config) if json else print(yaml.safe_dump(config, sort_keys=False), end="")


@app.command("plan-parallel")
def plan_parallel(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A recipe, or a Hugging Face folder.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs the job gets, on all nodes together.")],
    gpu: Annotated[str, typer.Option(help="Which: a100-40gb, a100-80gb, h100, h200 or b200.")] = "h100",
    changes: Set = None,
    json: Json = False,
) -> None:
    """Estimate memory and speed of a model's parallel layouts; print the command for the quickest that fits.

    Nothing is started and no GPU is asked for. Shown are the quickest layouts, those too that need more
    memory, with the GiB that each rank needs and what it spends its time on.

    Example: `bridgeworks plan-parallel llama31_70b_pretrain_config --gpus 64 --set model.seq_length=8192`
    """
    from flows.plan_parallel import show_plan

    show_plan(model, gpus, gpu, changes or [], as_json=json)


@app.command()
def doctor(
    workspace: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Where releases would keep their artifacts.", parser=written_here
        ),
    ] = Path("work"),
    json: Json = False,
) -> None:
    """Check what a run needs on this machine and say what to do about what is missing. Prints no secret."""
    from flows.console import print_json, print_table
    from flows.doctor import MISSING, examine

    findings = examine(workspace)
    if json:
        print_json([vars(each) for each in findings])
    else:
        rows = [(each.what, each.state, each.found, each.advice) for each in findings]
        print_table(("what", "state", "found", "what to do"), rows)
    if any(each.state == MISSING for each in findings):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
