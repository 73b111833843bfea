"""`bridgeworks compare`: the ledger and the logits of two checkpoints, each a gate."""

import tempfile
from pathlib import Path
from typing import Any

import typer

from bridge.errors import InputError
from bridge.gates import thresholds_for
from bridge.hf_checkpoint import HfCheckpoint
from bridge.job import write_json
from bridge.megatron_checkpoint import MegatronCheckpoint, is_megatron_checkpoint
from flows.console import print_json, print_table
from tasks.gates import Verdict, check_digests, gate_rows
from tasks.launch import launch


def compare(
    a: Path, b: Path, settings: dict[str, Any], *, gates: set[str], report: Path | None, as_json: bool
) -> None:
    """Run the gates, show their verdicts and end with exit code 1 if one failed."""
    a, b = a.absolute(), b.absolute()
    thresholds_for(settings["dtype"])
    for end in (a, b):
        check_end(end)
    with tempfile.TemporaryDirectory(prefix="bridgeworks-compare-") as folder:
        verdicts = []
        if "tensors" in gates:
            verdicts.append(check_digests(a, b, Path(folder) / "ledger.csv", "tensors"))
        if "logits" in gates:
            verdicts.append(check_logits(a, b, settings, Path(folder)))
    result = {"passed": all(each["passed"] for each in verdicts), "a": str(a), "b": str(b), "gates": verdicts}
    if report:
        write_json(report.absolute(), result)
    show(result, as_json)
    if not result["passed"]:
        raise typer.Exit(1)


def check_end(end: Path) -> None:
    """Refuse a folder that is no checkpoint, before a job is started."""
    if not end.is_dir():
        raise InputError(f"no such checkpoint folder: {end}")
    MegatronCheckpoint.open(end) if is_megatron_checkpoint(end) else HfCheckpoint.open(end)


def check_logits(a: Path, b: Path, settings: dict[str, Any], folder: Path) -> Verdict:
    """Compare logits in a job of tensor x pipeline ranks."""
    ranks = settings["tensor_model_parallel_size"] * settings["pipeline_model_parallel_size"]
    job = {"a": str(a), "b": str(b), **settings}
    found = launch("bridge.compare_logits", job, folder=folder, num_processes=ranks)
    about = {name: found[name] for name in ("dtype", "num_positions")}
    return {"gate": "logits", **found["gate"], **about}


def show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    rows = gate_rows(result["gates"])
    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    for gate in result["gates"]:
        for line in gate["failures"]:
            print(f"{gate['gate']}: {line}")
    print("the two are the same model" if result["passed"] else "the two are NOT the same model")
