"""The plan: for every step whether it will run, and why, without running anything, Prefect or torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tasks.artifact import Artifact, Store
from tasks.spec import ReleaseSpec
from tasks.step import Artifacts, Step

SHOWN_CHANGES = 3
# parts of a fingerprint record, and how a change in each is told
CHANGE_TITLES = {
    "config": "config changed: {name} {old} -> {new}",
    "inputs": "new {name}",
    "code.sources": "code of {name} changed",
    "code.versions": "{name} {old} -> {new}",
}


@dataclass(frozen=True)
class Decision:
    """What will happen to a step: its `artifact` is reused, or it runs for `reason`."""

    step: str
    action: Literal["reuse", "run"]
    reason: str
    artifact: Artifact | None = None
    # None while an input is still to be made
    record: dict[str, Any] | None = None
    # the artifact itself is whole, and replaced all the same
    rebuild: bool = False

    @property
    def runs(self) -> bool:
        return self.action == "run"

    def __str__(self) -> str:
        return f"{self.step:<14} {self.action:<6} {self.reason}"


def store_of(spec: ReleaseSpec) -> Store:
    """Return the store of the spec's workspace."""
    return Store(spec.workspace / "store")


def make_plan(spec: ReleaseSpec, chain: Iterable[Step], store: Store) -> list[Decision]:
    """Decide for each step in order; steps after one that runs wait for what it will make."""
    decisions: list[Decision] = []
    artifacts: Artifacts = {}
    for step in chain:
        decision = decide(step, spec, artifacts, store)
        decisions.append(decision)
        if decision.artifact:
            artifacts[step.name] = decision.artifact
    return decisions


def decide(step: Step, spec: ReleaseSpec, artifacts: Artifacts, store: Store) -> Decision:
    """Decide about one step, given the artifacts that are there; the flow asks the same before each step."""
    if missing := [name for name in step.needs if name not in artifacts]:
        return Decision(step.name, "run", "needs the new " + " and ".join(missing))
    record = step.fingerprint_record(spec, artifacts)
    artifact = store.find(step.name, record)
    if artifact is None:
        reason = _why_new(step, spec, record, store)
        return Decision(step.name, "run", reason, record=record)
    if problem := artifact.problem():
        return Decision(step.name, "run", f"artifact damaged: {problem}", record=record)
    if problem := step.check(spec, artifact):
        return Decision(step.name, "run", problem, record=record, rebuild=True)
    return Decision(step.name, "reuse", f"unchanged since {artifact.provenance['created']}", artifact, record)


def _why_new(step: Step, spec: ReleaseSpec, record: dict[str, Any], store: Store) -> str:
    """Compare with what this release built last, so that people see what they changed."""
    left = store.place(step.name, record).with_suffix(".partial")
    resumes = step.resumable and left.is_dir() and any(left.iterdir())
    going_on = "; goes on from where a run was stopped" if resumes else ""
    last = store.newest(step.name, spec.name)
    if last is None:
        return f"not built yet{going_on}"
    return "; ".join(changes(last.record, record)) + going_on


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say in a few words how two fingerprint records differ, config first."""
    words = []
    for section, title in CHANGE_TITLES.items():
        before, after = flatten(_part(old, section)), flatten(_part(new, section))
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                values = {"old": _shown(before.get(name)), "new": _shown(after.get(name))}
                words.append(title.format(name=name, **values))
    more = [f"and {len(words) - SHOWN_CHANGES} more"] if len(words) > SHOWN_CHANGES else []
    return [*words[:SHOWN_CHANGES], *more]


def _part(record: dict[str, Any], section: str) -> dict[str, Any]:
    for name in section.split("."):
        record = record[name]
    return record


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names; lists stay whole."""
    if not isinstance(value, dict) or (not value and prefix):
        return {prefix: value}
    joined = f"{prefix}." if prefix else ""
    return {
        name: leaf for key, item in value.items() for name, leaf in flatten(item, f"{joined}{key}").items()
    }


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
