"""Each fault is caught by exactly the gates that tests/mutations.py names, and every gate is needed."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from checkpoints import copy_checkpoint
from mutations import GATES, MUTATIONS, REFUSED, Mutation

from bridge import compare_logits, distributed
from bridge.compare_configs import compare_configs
from bridge.coverage import check_hf_coverage, check_megatron_coverage
from bridge.errors import CheckpointError, CoverageError, GateError, UnsupportedModelError
from bridge.families import families, plan_weights, provider_of
from bridge.hf_checkpoint import HfCheckpoint
from bridge.importer import import_checkpoint
from bridge.ledger import compare_ledgers, ledger
from bridge.logits import load_hf
from bridge.megatron_checkpoint import MegatronCheckpoint

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PRESENT = [each for each in MUTATIONS if each.family in families()]


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    distributed.finalize()


@pytest.mark.parametrize("mutation", PRESENT, ids=lambda mutation: mutation.fault)
def test_a_fault_is_caught_by_these_gates(
    mutation: Mutation, hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    # At the usual 0.02 attention is nearly a plain mean over positions, and hides faults in it.
    source = hf_checkpoint(mutation.family, initializer_range=0.1, **mutation.settings)
    with mutation.rule() if mutation.rule else nullcontext():
        megatron = import_checkpoint(source, tmp_path / "megatron").path
        mutation.apply(copy_checkpoint(source, tmp_path / "hf"))
        mutation.megatron(megatron)
        caught = gates_that_fail(megatron, tmp_path / "hf", mutation.prompt_length)
    assert {gate for gate, failed in caught.items() if failed} == mutation.caught_by
    assert {gate for gate in GATES if gate not in caught} == mutation.not_reached


@pytest.mark.parametrize("family", sorted({mutation.family for mutation in PRESENT}))
def test_without_a_fault_no_gate_fails(
    family: str, hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = hf_checkpoint(family, initializer_range=0.1)
    megatron = import_checkpoint(source, tmp_path / "megatron").path
    assert gates_that_fail(megatron, source) == dict.fromkeys(GATES, False)


def gates_that_fail(megatron: Path, hf: Path, prompt_length: int = 64) -> dict[str, bool]:
    """Say of each gate that is reached whether it fails."""
    failed = {**refusals(hf, megatron), "reload": reload_fails(hf)}
    if any(failed[gate] for gate in failed if gate != "reload"):
        return failed
    failed["settings"] = bool(compare_configs(megatron, hf))
    failed["digests"] = not compare_ledgers(ledger(megatron), ledger(hf)).passed
    if not failed["reload"]:
        for short, dtype in DTYPES.items():
            job = {"a": str(megatron), "b": str(hf), "dtype": dtype, "prompt_length": prompt_length}
            report = compare_logits.main(job)
            failed[f"logits {short}"] = not report["gate"]["passed"]
            if "hidden_states" in report:  # which models of other sizes do not get to
                failed[f"hidden {short}"] = not report["hidden_states"]["passed"]
    return failed


def refusals(hf: Path, megatron: Path) -> dict[str, bool]:
    failed = dict.fromkeys(set(GATES) - REFUSED - {"reload"}, False)
    try:
        checkpoint = HfCheckpoint.open(hf)
    except CheckpointError:
        return failed | {"files": True}
    try:
        plan = plan_weights(provider_of(checkpoint.config))
        check_hf_coverage(plan, checkpoint)
        other = MegatronCheckpoint.open(megatron)
        check_megatron_coverage(other.plan(), other.metadata.tensors, other.padding, str(megatron))
    except UnsupportedModelError:
        failed["config keys"] = True
    except CoverageError:
        failed["coverage"] = True
    except CheckpointError:
        failed["tied copies"] = True
    return failed


def reload_fails(hf: Path) -> bool:
    try:
        complaints = load_hf(hf, "float32").complaints
    except GateError:
        return True
    return any(complaints.values())


def test_every_fault_is_caught() -> None:
    assert all(mutation.caught_by for mutation in MUTATIONS)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_catches_what_another_one_misses(gate: str) -> None:
    """For each other gate there is a fault that this one catches and that one does not."""
    for other in set(GATES) - {gate}:
        assert any(gate in each.caught_by and other not in each.caught_by for each in MUTATIONS), other
