"""The gates of a release, coverage, digests, logits and held-out loss: each a verdict with its measures."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.compare_configs import compare_configs
from bridge.coverage import check_hf_coverage, check_megatron_coverage
from bridge.ends import NOTHING, GivenModel, open_megatron
from bridge.errors import GateError, InputError
from bridge.families import plan_weights, provider_of
from bridge.gates import within
from bridge.hf_checkpoint import HfCheckpoint
from bridge.job import write_json
from bridge.ledger import EQUAL, STATES, LedgerComparison, LedgerRecord, compare_ledgers, ledger
from bridge.megatron_checkpoint import is_megatron_checkpoint
from tasks.spec import CheckSpec
from tasks.step import StepContext

# {"gate", "passed", "metrics": {name: number}, "thresholds": {name: number}, "failures": [line]}
Verdict = dict[str, Any]

REPORT = "report.json"
LEDGER, POSITIONS, LAYERS, PICTURE = "ledger.csv", "logits.jsonl", "layers.jsonl", "differences.png"


def check_coverage(end: Path, name: str = "coverage", given: GivenModel = NOTHING) -> Verdict:
    """Check that a checkpoint of either kind holds exactly the tensors that its config declares."""
    failures = []
    tensors = 0
    try:
        tensors = covered(end, given)
    except InputError as error:  # here it is our own output that is wrong, not what a user gave
        failures.append(str(error))
    return verdict(name, {"tensors": tensors, "unaccounted": len(failures)}, {"unaccounted": 0}, failures)


def covered(end: Path, given: GivenModel = NOTHING) -> int:
    """Return how many tensors a checkpoint has; anything missing, left over or of another shape is raised."""
    if is_megatron_checkpoint(end):
        checkpoint = open_megatron(end, given)
        plan = checkpoint.plan()
        stored = checkpoint.metadata.tensors
        check_megatron_coverage(plan, stored, checkpoint.padding, str(checkpoint.path))
    else:
        source = HfCheckpoint.open(end)
        plan = plan_weights(provider_of(source.config))
        check_hf_coverage(plan, source)
    return len(plan.hf_shapes)


def check_config(a: Path, b: Path, name: str = "config", given: GivenModel = NOTHING) -> Verdict:
    """Check that two ends say the same of their model in every setting."""
    found = compare_configs(a, b, given)
    failures = [f"{each.name} is {each.a!r} in {a.name} and {each.b!r} in {b.name}" for each in found]
    return verdict(name, {"differences": len(found)}, {"differences": 0}, failures)


def check_digests(
    a: Path, b: Path, table: Path, name: str = "digests", given: GivenModel = NOTHING
) -> Verdict:
    """Compare two checkpoints bit for bit, tensor by tensor; `table` gets the ledger of both."""
    found = compare_ledgers(ledger(a, given=given), ledger(b, given=given))
    write_ledger(found, table)
    groups = {state: found.names(state) for state in STATES}
    failures = [
        f"{len(names)} tensors {state}: {', '.join(names[:3])}"
        for state, names in groups.items()
        if names and state != EQUAL
    ]
    counts = {state: len(names) for state, names in groups.items()}
    return verdict(name, counts, {state: 0 for state in STATES if state != EQUAL}, failures)


def check_logits(
    a: Path, b: Path, check: CheckSpec, folder: Path, context: StepContext, name: str = "logits"
) -> list[Verdict]:
    """Compare logits and hidden states of two checkpoints for several prompts, in a job.

    The tables and their picture are kept with the run, and copied to `folder`.
    """
    job = {
        "a": str(a),
        "b": str(b),
        "prompts": None,
        "num_prompts": check.num_prompts,
        "prompt_length": check.prompt_length,
        "dtype": str(check.dtype),
        "seed": check.seed,
        **check.model_sizes,
    }

    def run(job: dict[str, Any]) -> dict[str, Any]:
        return context.launch("bridge.compare_logits", job, name=name, num_processes=check.num_processes)

    verdicts, files = measure_logits(job, context.folder, run)
    for file in files:
        shutil.copyfile(file, folder / file.name)
        context.run.log_file(file)
    return verdicts


def measure_logits(
    job: dict[str, Any], folder: Path, run: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[list[Verdict], list[Path]]:
    """Run the parity job by `run`; return its verdicts, and its tables and their picture in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    table, layers, picture = (folder / name for name in (POSITIONS, LAYERS, PICTURE))
    report = run({**job, "table": str(table), "layers_table": str(layers), "scratch": str(folder)})
    about = {"dtype": report["dtype"], "num_positions": report["num_positions"]}
    verdicts = [{"gate": "logits", **report["gate"], **about}]
    if not report["num_positions"]:
        return verdicts, []
    verdicts += [{"gate": gate, **report[gate]} for gate in ("hidden_states", "reload")]
    from tasks.picture import draw_differences
    from tasks.tables import Layers, Logits, checked, read_rows

    draw_differences(
        checked(Logits, read_rows(table), str(table)),
        checked(Layers, read_rows(layers), str(layers)),
        verdicts,
        picture,
    )
    return verdicts, [table, layers, picture]


def check_loss(
    before: Path, after: Path, dataset: Path, seq_length: int, check: CheckSpec, context: StepContext
) -> Verdict:
    """Compare the loss of two checkpoints on text that neither was trained on."""
    job = {
        "dataset": str(dataset),
        "seq_length": seq_length,
        "num_batches": check.loss_batches,
        # Megatron's own default is the dataset's folder, which is sealed
        "path_to_cache": str(context.folder / "sample_indices"),
    }
    losses = {}
    for name, checkpoint in (("loss_before", before), ("loss_after", after)):
        report = context.launch(
            "training.evaluate",
            {**job, "checkpoint": str(checkpoint), **check.model_sizes},
            name=name,
            num_processes=check.num_processes,
        )
        losses[name] = report["loss"]
    allowed = losses["loss_before"] + check.max_loss_increase
    failures = []
    if not losses["loss_after"] <= allowed:
        failures.append(
            f"held-out loss is {losses['loss_after']:.4f} after training, allowed is {allowed:.4f}"
        )
    return verdict("held_out_loss", losses, {"loss_after": allowed}, failures)


def verdict(name: str, metrics: dict[str, Any], thresholds: dict[str, Any], failures: list[str]) -> Verdict:
    """Put a verdict together; it has passed when nothing failed."""
    return {
        "gate": name,
        "passed": not failures,
        "metrics": metrics,
        "thresholds": thresholds,
        "failures": failures,
    }


def conclude(verdicts: list[Verdict], folder: Path, context: StepContext, step: str) -> dict[str, Any]:
    """Write the report and show the table; GateError says what failed and where the report is kept."""
    report = {
        "passed": all(each["passed"] for each in verdicts),
        "gates": {each["gate"]: each for each in verdicts},
    }
    kept = context.keep(REPORT, report)
    context.run.log_file(kept)
    rows = gate_rows(verdicts)
    context.table(f"{step}-gates", rows, f"Gates of {step}: {'passed' if report['passed'] else 'FAILED'}")
    if not report["passed"]:
        lines = [f"{each['gate']}: {line}" for each in verdicts for line in each["failures"]]
        raise GateError(f"{step} failed: {'; '.join(lines)} (report: {kept})")
    write_json(folder / REPORT, report)
    return report


def gate_rows(verdicts: list[Verdict]) -> list[dict[str, str]]:
    """Return one row for each measure that has a threshold."""
    from tasks.tables import Gates, checked

    rows = [_row(each["gate"], name, each) for each in verdicts for name in each["thresholds"]]
    checked(Gates, rows, "the gates' table")
    return rows


def _row(gate: str, name: str, each: Verdict) -> dict[str, str]:
    value, bound = each["metrics"][name], each["thresholds"][name]
    passed = within(value, bound)
    return {
        "gate": gate,
        "measure": name,
        "value": f"{value:.6g}",
        "allowed": f"at most {bound:.6g}",
        "verdict": "passed" if passed else "FAILED",
    }


def write_ledger(comparison: LedgerComparison, path: Path) -> None:
    """Write the ledger of two ends as a checked CSV table."""
    from tasks.tables import LedgerTable, checked

    rows = [
        {
            "name": row.name,
            "rule": row.rule,
            "state": row.state,
            **_side("a", row.a),
            **_side("b", row.b),
        }
        for row in comparison.rows
    ]
    checked(LedgerTable, rows, "the ledger").to_csv(path, index=False)


def _side(end: str, record: LedgerRecord | None) -> dict[str, Any]:
    names = ("file", "offset", "shape", "dtype", "sha256")
    if record is None:
        return {f"{name}_{end}": None for name in names}
    return {f"{name}_{end}": getattr(record, name) for name in names} | {
        f"shape_{end}": str(list(record.shape))
    }
