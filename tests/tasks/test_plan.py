"""The plan: why a step runs, said before anything runs."""

from pathlib import Path

import pytest

from tasks.artifact import Kind, Store
from tasks.plan import changes, decide, make_plan, store_of
from tasks.spec import ReleaseSpec, parse_spec
from tasks.step import Artifacts, Step, StepContext


def spec_with(workspace: Path, **overrides: object) -> ReleaseSpec:
    return parse_spec(
        {
            "name": "tiny",
            "workspace": workspace,
            "source": {"uri": "/nowhere"},
            "dataset": {"inputs": ["/nowhere"]},
            "train": {"overrides": overrides},
            "publish": {"destination": "/nowhere"},
        }
    )


def copy(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict:
    (folder / "checkpoint").write_text(repr(spec.train.overrides) if "fetch" in artifacts else "source")
    return {}


FETCH = Step("fetch", Kind.SOURCE, (), lambda spec, artifacts: {"uri": spec.source.uri}, copy)
TRAIN = Step(
    "train",
    Kind.MEGATRON_CHECKPOINT,
    ("fetch",),
    lambda spec, artifacts: {"overrides": spec.train.overrides},
    copy,
    sources=("tasks.step",),
    resumable=True,
)
EXPORT = Step("export", Kind.HF_CHECKPOINT, ("train",), lambda spec, artifacts: {}, copy)
CHAIN = (FETCH, TRAIN, EXPORT)


def run(spec: ReleaseSpec, chain: tuple[Step, ...] = CHAIN) -> None:
    store, artifacts = store_of(spec), {}
    for step in chain:
        record = step.fingerprint_record(spec, artifacts)
        artifacts[step.name] = store.build(
            step.name, step.kind, record, lambda f, s=step: s.build(spec, artifacts, f, None), name=spec.name
        )


def plan(spec: ReleaseSpec) -> list[tuple[str, str]]:
    return [(decision.action, decision.reason) for decision in make_plan(spec, CHAIN, store_of(spec))]


@pytest.fixture
def spec(tmp_path) -> ReleaseSpec:
    return spec_with(tmp_path)


def test_first_run_builds_all(spec) -> None:
    assert plan(spec) == [
        ("run", "not built yet"),
        ("run", "needs the new fetch"),
        ("run", "needs the new train"),
    ]


def test_second_run_builds_nothing(spec) -> None:
    run(spec)
    assert [action for action, _ in plan(spec)] == ["reuse"] * 3


def test_changed_recipe_says_what_changed(tmp_path) -> None:
    run(spec_with(tmp_path, **{"optimizer.lr": 0.0003}))
    assert plan(spec_with(tmp_path, **{"optimizer.lr": 0.0001}))[1:] == [
        ("run", "config changed: overrides.optimizer.lr 0.0003 -> 0.0001"),
        ("run", "needs the new train"),
    ]


def test_going_back_reuses(tmp_path) -> None:
    for rate in (0.1, 0.2):
        run(spec_with(tmp_path, **{"optimizer.lr": rate}))
    assert [action for action, _ in plan(spec_with(tmp_path, **{"optimizer.lr": 0.1}))] == ["reuse"] * 3


def test_same_output_of_a_new_input_ends_the_chain_of_runs(spec) -> None:
    run(spec)
    moved = spec.model_copy(update={"source": spec.source.model_copy(update={"uri": "/elsewhere"})})
    assert plan(moved)[0] == ("run", 'config changed: uri "/nowhere" -> "/elsewhere"')
    run(moved, (FETCH,))
    assert [action for action, _ in plan(moved)] == ["reuse"] * 3


def test_missing_file_is_named(spec) -> None:
    run(spec)
    store_of(spec).newest("train", "tiny").payload.unlink()
    assert plan(spec)[1] == ("run", "artifact damaged: file checkpoint is missing")


def test_stopped_run_is_gone_on_with(spec) -> None:
    run(spec, (FETCH,))
    store = store_of(spec)
    artifacts = {"fetch": store.newest("fetch", "tiny")}
    record = TRAIN.fingerprint_record(spec, artifacts)
    left = "not built yet"
    for fill in (lambda folder: 1 / 0, lambda folder: (folder / "half").touch() or 1 / 0):
        assert decide(TRAIN, spec, artifacts, store).reason == left
        with pytest.raises(ZeroDivisionError):
            store.build("train", TRAIN.kind, record, fill, name="tiny", resumable=True)
    assert decide(TRAIN, spec, artifacts, store).reason == f"{left}; goes on from where a run was stopped"


def test_code_and_inputs_are_named() -> None:
    old = {
        "config": {},
        "inputs": {"source": "a"},
        "code": {"sources": {"bridge": "1"}, "versions": {"torch": "2.14"}},
    }
    new = {
        "config": {},
        "inputs": {"source": "b"},
        "code": {"sources": {"bridge": "2"}, "versions": {"torch": "2.15"}},
    }
    assert changes(old, new) == ["new source", "code of bridge changed", 'torch "2.14" -> "2.15"']


def test_many_changes_are_counted() -> None:
    old, new = (
        {"config": {str(n): value for n in range(5)}, "inputs": {}, "code": {"sources": {}, "versions": {}}}
        for value in (0, 1)
    )
    assert changes(old, new) == [*[f"config changed: {n} 0 -> 1" for n in range(3)], "and 2 more"]


def test_store_is_in_the_workspace(spec, tmp_path) -> None:
    assert store_of(spec).root == Store(tmp_path / "store").root
