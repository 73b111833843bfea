"""`bridgeworks compare`: config, tensors, logits and hidden states of two checkpoints, each a gate."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from bridge import check_layout
from bridge.ends import GivenModel, describe, given_for, is_described
from bridge.errors import InputError
from bridge.gates import check_dtype, place_of
from bridge.hf_checkpoint import HfCheckpoint
from bridge.job import finite, write_json
from bridge.megatron_checkpoint import MegatronCheckpoint, is_megatron_checkpoint
from bridge.prompts import check_prompts
from bridge.provider import GPTModelProvider
from flows.console import print_json, print_table
from flows.options import Gate
from tasks.errors import JobError
from tasks.gates import (
    LEDGER,
    PICTURE,
    REPORT,
    Verdict,
    check_config,
    check_coverage,
    check_digests,
    gate_rows,
    measure_logits,
)
from tasks.gpus import check_gpus
from tasks.launch import launch


def settings_of(
    tensor: int, pipeline: int, expert: int, prompts: Path | None, num_prompts: int, prompt_length: int
) -> dict[str, Any]:
    """Return what the job of `bridge.compare_logits` is told of layout and prompts."""
    return {
        **dict(zip(check_layout.SIZES, (tensor, pipeline, expert), strict=True)),
        "prompts_file": str(prompts.absolute()) if prompts else None,
        "num_prompts": num_prompts,
        "prompt_length": prompt_length,
    }


def compare(
    a: Path,
    b: Path,
    settings: dict[str, Any],
    *,
    dtypes: list[str],
    gates: set[str],
    config_from: Path | None = None,
    family: str | None = None,
    report: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Run the gates, show their verdicts and end with exit code 1 if one failed.

    `config_from` and `family` describe ends of plain Megatron-LM; without them the other end does.
    """
    a, b = a.absolute(), b.absolute()
    dtypes = list(dict.fromkeys(dtypes))
    for dtype in dtypes:
        check_dtype(dtype)
    for end in (a, b):
        check_end(end)
    given = given_for(a, b, config_from.absolute() if config_from else None, family)
    if "logits" in gates:
        check_sizes((a, b), settings, given)
        check_prompts_file((a, b), settings, given)
    elif picture:
        raise InputError("--picture draws what the gate logits measures: leave out --only")
    check_places(report, picture)
    with scratch_folder() as folder:
        verdicts = judge(a, b, settings, dtypes, gates, folder, given)
        passed = all(each["passed"] for each in verdicts)
        result = {"passed": passed, "a": str(a), "b": str(b), "gates": verdicts}
        keep(result, folder, dtypes, report, picture)
    show(result, as_json, gates)
    if not passed:
        raise typer.Exit(1)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder for the time of a comparison; when its job fails the log stays, as the error names it."""
    folder = Path(tempfile.mkdtemp(prefix="bridgeworks-compare-"))
    kept = False
    try:
        yield folder
    except JobError:
        kept = True
        for file in (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"):
            file.unlink()
        raise
    finally:
        if not kept:
            shutil.rmtree(folder)


def judge(
    a: Path,
    b: Path,
    settings: dict[str, Any],
    dtypes: list[str],
    gates: set[str],
    folder: Path,
    given: GivenModel,
) -> list[Verdict]:
    """Run the gates that are asked for; what cannot be measured because an end is not whole is left out."""
    verdicts = [check_config(a, b, given=given)] if "config" in gates else []
    covered = [check_coverage(a, "coverage_a", given), check_coverage(b, "coverage_b", given)]
    if "tensors" in gates or not all(each["passed"] for each in covered):
        verdicts += covered
    if not all(each["passed"] for each in covered):
        return verdicts
    if "tensors" in gates:
        verdicts.append(check_digests(a, b, folder / LEDGER, "tensors", given))
    source = {"config_from": str(given.config_from) if given.config_from else None, "family": given.family}
    for dtype in dtypes if "logits" in gates else []:
        job = {**settings, **source, "a": str(a), "b": str(b), "dtype": dtype}
        found = compare_logits(job, folder / dtype)
        verdicts += [{**each, "gate": f"{each['gate']}_{dtype}"} for each in found]
    return verdicts


def compare_logits(job: dict[str, Any], folder: Path) -> list[Verdict]:
    """Compare logits and hidden states in a job of as many ranks as its layout takes."""

    def run(job: dict[str, Any]) -> dict[str, Any]:
        return launch(
            "bridge.compare_logits", job, folder=folder / "job", num_processes=check_layout.num_ranks(job)
        )

    return measure_logits(job, folder, run)[0]


def check_end(end: Path) -> None:
    """Refuse a folder that is no checkpoint, before a job is started."""
    if not end.is_dir():
        raise InputError(f"no such checkpoint folder: {end}")
    if not is_megatron_checkpoint(end):
        HfCheckpoint.open(end)
    elif is_described(end):
        MegatronCheckpoint.open(end)


def check_places(report: Path | None, picture: Path | None) -> None:
    """Refuse places where nothing can be kept, before anything is measured; make their folders."""
    files = [path for path in (picture, report if report and report.suffix == ".json" else None) if path]
    for file in files:
        if file.is_dir():
            raise InputError(f"{file} is a folder: name a file in it")
    folders = [file.parent for file in files] + ([report] if report and report not in files else [])
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be a folder: {error.strerror}: give another place") from error


def check_sizes(ends: tuple[Path, Path], settings: dict[str, Any], given: GivenModel) -> None:
    """Refuse a layout that a Megatron end cannot have, before a job is started."""
    for end in filter(is_megatron_checkpoint, ends):
        check_layout.laid_out(model_of(end, given), settings).finalize()
    check_gpus(check_layout.num_ranks(settings), "--tp, --pp and --ep")


def model_of(end: Path, given: GivenModel) -> GPTModelProvider:
    """Describe an end's model; contradictions to another folder are for the gates to tell."""
    return describe(end if is_described(end) else given.config_from or end, given)


def check_prompts_file(ends: tuple[Path, Path], settings: dict[str, Any], given: GivenModel) -> None:
    """Refuse a file of prompts that cannot be used, before anything is measured."""
    if settings["prompts_file"]:
        folders = [*ends, *([given.config_from] if given.config_from else [])]
        check_prompts(Path(settings["prompts_file"]), folders, model_of(ends[0], given).vocab_size)


def keep(
    result: dict[str, Any], folder: Path, dtypes: list[str], report: Path | None, picture: Path | None
) -> None:
    """Copy what was asked for: the verdicts to a .json file, or all with tables and pictures to a folder."""
    if report and report.suffix == ".json":
        write_json(report.absolute(), finite(result))
    elif report:
        write_json(report.absolute() / REPORT, finite(result))
        for file in (path for path in folder.rglob("*") if path.suffix in (".csv", ".jsonl", ".png")):
            target = report / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    drawn = [folder / dtype / PICTURE for dtype in dtypes if (folder / dtype / PICTURE).is_file()]
    if picture and drawn:
        shutil.copyfile(drawn[0], picture)


def show(result: dict[str, Any], as_json: bool, gates: set[str]) -> None:
    if as_json:
        print_json(result)
        return
    if rows := gate_rows(result["gates"]):
        print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    for gate in result["gates"]:
        for line in gate["failures"]:
            print(f"{gate['gate']}: {line}")
    for gate in result["gates"]:
        if "num_layers" in gate:
            print(where_they_part(gate, result["gates"]))
    print(conclusion(result["passed"], gates))


def conclusion(passed: bool, gates: set[str]) -> str:
    """Say in words what the gates that were asked for have shown."""
    left_out = [gate for gate in Gate if gate not in gates]
    if passed and left_out:
        return f"the two agree in {' and '.join(gates)}; {' and '.join(left_out)} were not compared"
    return "the two are the same model" if passed else "the two are NOT the same model"


def where_they_part(hidden: Verdict, gates: list[Verdict]) -> str:
    """Say in words where two ends part, from the verdict on hidden states and the one on logits beside it."""
    dtype = hidden["gate"].removeprefix("hidden_states_")
    [logits] = [each for each in gates if each["gate"] == f"logits_{dtype}"]
    if hidden["parts_at"] is not None:
        return f"{dtype}: the two part {place_of(hidden['parts_at'], hidden['num_layers'])}"
    if not logits["passed"]:
        return f"{dtype}: the two part behind the last layer: final norm or output projection"
    return f"{dtype}: the two agree at every layer and position"
