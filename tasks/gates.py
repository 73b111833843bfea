"""The gates of a release, coverage, digests, logits and held-out loss: each a verdict with its measures."""

from pathlib import Path
from typing import Any

from bridge.coverage import check_hf_coverage
from bridge.errors import GateError, InputError
from bridge.families import plan_weights, provider_of
from bridge.gates import AT_LEAST, within
from bridge.hf_checkpoint import HfCheckpoint
from bridge.job import write_json
from bridge.ledger import Ledger, compare_ledgers, ledger
from tasks.spec import CheckSpec
from tasks.step import StepContext

# {"gate", "passed", "metrics": {name: number}, "thresholds": {name: number}, "failures": [line]}
Verdict = dict[str, Any]

REPORT = "report.json"


def check_coverage(hf_folder: Path, name: str = "coverage") -> Verdict:
    """Check that a Hugging Face folder holds exactly the tensors that its config declares."""
    failures = []
    tensors = 0
    try:
        checkpoint = HfCheckpoint.open(hf_folder)
        plan = plan_weights(provider_of(checkpoint.config))
        check_hf_coverage(plan, checkpoint)
        tensors = len(plan.hf_shapes)
    except InputError as error:  # here it is our own output that is wrong, not what a user gave
        failures.append(str(error))
    return verdict(name, {"tensors": tensors, "unaccounted": len(failures)}, {"unaccounted": 0}, failures)


def check_digests(a: Path, b: Path, table: Path, name: str = "digests") -> Verdict:
    """Compare two checkpoints bit for bit, tensor by tensor; `table` gets the second one's ledger."""
    left, right = ledger(a), ledger(b)
    write_ledger(right, table)
    found = compare_ledgers(left, right)
    names = {"missing": found.missing, "extra": found.extra, "different": found.different}
    failures = [
        f"{len(group)} tensors {word}: {', '.join(group[:3])}" for word, group in names.items() if group
    ]
    counts = {word: len(group) for word, group in names.items()}
    return verdict(name, {"equal": len(found.equal), **counts}, dict.fromkeys(counts, 0), failures)


def check_logits(a: Path, b: Path, check: CheckSpec, context: StepContext, name: str = "logits") -> Verdict:
    """Compare the logits of two checkpoints at every position of several prompts, in a job."""
    table = context.folder / f"{name}.jsonl"
    job = {
        "a": str(a),
        "b": str(b),
        "prompts": None,
        "num_prompts": check.num_prompts,
        "prompt_length": check.prompt_length,
        "dtype": str(check.dtype),
        "seed": check.seed,
        "table": str(table),
        **check.model_sizes,
    }
    from tasks.tables import Logits, checked, read_rows

    report = context.launch("bridge.compare_logits", job, name=name, num_processes=check.num_processes)
    checked(Logits, read_rows(table), str(table))
    return {
        "gate": name,
        **report["gate"],
        "dtype": report["dtype"],
        "num_positions": report["num_positions"],
    }


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
    direction = "at least" if name in AT_LEAST else "at most"
    passed = within(name, value, bound)
    return {
        "gate": gate,
        "measure": name,
        "value": f"{value:.6g}",
        "allowed": f"{direction} {bound:.6g}",
        "verdict": "passed" if passed else "FAILED",
    }


def write_ledger(records: Ledger, path: Path) -> None:
    """Write a checkpoint's ledger as a checked CSV table."""
    from tasks.tables import LedgerTable, checked

    rows = [
        {
            "name": record.name,
            "dtype": record.dtype,
            "shape": str(list(record.shape)),
            "sha256": record.sha256,
        }
        for record in records.records
    ]
    checked(LedgerTable, rows, "the ledger").to_csv(path, index=False)
