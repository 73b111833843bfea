"""`bridgeworks release` and `plan`: the plan first, the flow if there is work to do, a table at the end."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.console import PLAIN_SECONDS, person_watches, print_json, print_table
from flows.doctor import MISSING, check_prefect
from flows.layouts import layout_of, ranks_in_words
from flows.pages import page_lines, prepare_prefect
from tasks.artifact import Artifact, Kind
from tasks.chain import CHAIN
from tasks.errors import JobStoppedError, StoreError
from tasks.plan import Decision, make_plan, store_of
from tasks.preflight import check_spec
from tasks.release import RELEASE
from tasks.spec import ReleaseSpec


def planned(spec: ReleaseSpec, *, here: bool) -> list[Decision]:
    """Refuse a spec that cannot work, `here` one that this machine cannot run, and make the plan."""
    check_spec(spec, here=here)
    return make_plan(spec, CHAIN, store_of(spec))


def plan_rows(spec: ReleaseSpec, decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """Return the plan as JSON values; "parallel" says how the job of a step is spread, if it may be."""
    rows = decision_rows(decisions)
    return [{**row, "parallel": layout_of(spec, row["step"])} for row in rows]


def decision_rows(decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    return [
        {
            "step": each.step,
            "action": each.action,
            "reason": each.reason,
            "artifact": str(each.artifact.path) if each.artifact else None,
        }
        for each in decisions
    ]


def print_plan(spec: ReleaseSpec, decisions: Sequence[Decision]) -> None:
    rows = [
        (row["step"], row["action"], ranks_in_words(row["parallel"]), row["reason"])
        for row in plan_rows(spec, decisions)
    ]
    print_table(("step", "action", "ranks", "why"), rows, title="Plan")


def run_release(spec: ReleaseSpec, *, as_json: bool = False) -> None:
    """Make the release that the spec asks for and show it; without anything to do Prefect is not started."""
    prepare_prefect(spec.workspace)
    decisions = planned(spec, here=True)
    if not as_json:
        print_plan(spec, decisions)
    if any(decision.runs for decision in decisions):
        result = run_flow(spec, quiet=as_json)
    else:
        result = reused(spec, decisions)
    if as_json:
        print_json(result)
    else:
        show_result(result)


def reused(spec: ReleaseSpec, decisions: Sequence[Decision]) -> dict[str, Any]:
    """Return what the flow would, of a release of which every step is there."""
    artifacts = [decision.artifact for decision in decisions if decision.artifact]
    release = json.loads((artifacts[-1].payload / RELEASE).read_text())
    return {
        "name": spec.name,
        "steps": [
            {**row, "seconds": 0.0, "digest": artifact.digest}
            for row, artifact in zip(decision_rows(decisions), artifacts, strict=True)
        ],
        "release": artifacts[-1].output,
        "identifiers": release["identifiers"],
        "problems": [],
    }


def run_flow(spec: ReleaseSpec, *, quiet: bool) -> dict[str, Any]:
    """Run the flow in this process, each step shown as it goes; what it raises is raised here."""
    from prefect.exceptions import TerminationSignal
    from prefect.settings import get_current_settings

    from flows.local_server import local_server
    from flows.release_model import release_model
    from tasks.perform_step import watcher

    server = check_prefect(get_current_settings().api.url)
    if server.state == MISSING:
        raise StoreError(f"Prefect: {server.found}: {server.advice}")
    with local_server(), StepLines(quiet=quiet) as lines:
        token = watcher.set(lines)
        try:
            state = release_model(spec, return_state=True)
        except TerminationSignal:
            sys.exit(143)
        finally:
            watcher.reset(token)
    if state.is_cancelled():
        raise JobStoppedError(f"the release was cancelled: {state.message}")
    return state.result()


def show_result(result: dict[str, Any]) -> None:
    """Print the table of the steps, where the release lies, and how to open the pages of the run."""
    rows = [
        (row["step"], f"{row['seconds']:.1f} s", verdict(row), shortened(Path(row["artifact"])))
        for row in result["steps"]
    ]
    total = sum(row["seconds"] for row in result["steps"])
    print()
    print_table(("step", "time", "verdict", "artifact"), rows, title=f"{result['name']}: {total:.0f} s")
    release = result["release"]
    version = f", version {release['version']}" if release["version"] else ""
    address = release["address"]
    shown = address if "://" in address else shortened(Path(address))
    print(f"\nRelease: {shown} (model {release['model']}{version} in MLflow)")
    for problem in result["problems"]:
        print(f"warning: MLflow: {problem}")
    for line in page_lines(result["identifiers"]):
        print(line)


def verdict(row: dict[str, Any]) -> str:
    """Say how a step ended: a gate that has an artifact has passed."""
    if row["action"] == "reuse":
        return "reused"
    gates = {step.name for step in CHAIN if step.kind is Kind.GATE_REPORT}
    return "passed" if row["step"] in gates else "done"


def shortened(path: Path) -> str:
    """Return a path below the current folder without it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


class StepLines:
    """A `tasks.perform_step.Watcher` that shows what each step does, says and has reached."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._started = 0
        self._last = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "StepLines":
        if not self._quiet and person_watches():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def decided(self, decision: Decision) -> None:
        self._started += 1
        self._last = time.monotonic()
        word = "runs" if decision.runs else "reused"
        self._say(f"[{self._started}/{len(CHAIN)}] {decision.step} {word}: {decision.reason}")
        if self._bar:
            self._remove_task()
            self._task = self._bar.add_task(decision.step, total=None)

    def line(self, step: str, text: str) -> None:
        self._say(f"  {step}: {text}")

    def progressed(self, step: str, done: float, total: float, description: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, description=f"{step}: {description}")
        elif time.monotonic() - self._last > PLAIN_SECONDS:
            self._last = time.monotonic()
            self._say(f"  {step}: {done / max(total, 1):.0%} {description}")

    def finished(self, step: str, artifact: Artifact, seconds: float) -> None:
        if seconds:
            self._say(f"  {step}: done in {seconds:.1f} s, {shortened(artifact.path)}")
        self._remove_task()

    def _remove_task(self) -> None:
        if self._bar and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _say(self, text: str) -> None:
        if self._quiet:
            return
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what happens and how long it took."""
    started = time.monotonic()
    print(f"{what} ...", flush=True)
    yield
    print(f"  done in {time.monotonic() - started:.1f} s", flush=True)
