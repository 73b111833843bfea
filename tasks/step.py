"""What a step of the release is, and what it is given while it runs; free of Prefect, MLflow and torch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.job import finite, write_json
from tasks.artifact import Artifact, Kind
from tasks.code_version import code_record, code_version
from tasks.launch import launch
from tasks.lineage import Lineage, StepRun
from tasks.spec import ReleaseSpec

Artifacts = dict[str, Artifact]


@dataclass
class StepRecord:
    """What became of one step in this run, for tables and for release.json."""

    step: str
    action: str
    reason: str
    seconds: float
    artifact: Path
    digest: str
    run: StepRun = field(default_factory=StepRun)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values; MLflow's id is None if MLflow has not answered yet."""
        return {
            "step": self.step,
            "action": self.action,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "artifact": str(self.artifact),
            "digest": self.digest,
            "mlflow_run_id": self.run.run_id,
        }


@dataclass
class RunRecord:
    """One run of the flow: who it is in Prefect and MLflow, which code ran, what each step did so far."""

    name: str
    # logs, job files and gate reports of this run, one folder a step
    folder: Path
    prefect_flow_run_id: str | None = None
    lineage: Lineage = field(default_factory=Lineage)
    code: dict[str, Any] = field(default_factory=code_version)
    steps: list[StepRecord] = field(default_factory=list)

    @property
    def identifiers(self) -> dict[str, Any]:
        """The ids by which Prefect and MLflow know this run, as release.json has them."""
        return {"prefect_flow_run_id": self.prefect_flow_run_id, "mlflow": self.lineage.identifiers}

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "identifiers": self.identifiers,
            "code": self.code,
            "steps": [step.to_dict() for step in self.steps],
        }


@dataclass
class StepContext:
    """A step's way to the outside: its log, its progress, its jobs and its run in MLflow."""

    record: RunRecord
    # of this step in this run; reports of failing gates stay here
    folder: Path
    run: StepRun = field(default_factory=StepRun)

    def log(self, line: str) -> None:
        """Tell the person who watches one line."""
        print(line, flush=True)

    def progress(self, done: float, total: float, description: str) -> None:
        """Tell how much of the step is done; called as often as the step likes."""

    def tick(self) -> None:
        """Is called often while a job runs."""

    def table(self, name: str, rows: list[dict[str, Any]], description: str) -> None:
        """Show a small table, such as a gate's verdict."""

    def keep(self, name: str, value: Any) -> Path:
        """Write JSON to this step's folder of the run, where it outlives a failing step; return its path."""
        write_json(self.folder / name, finite(value))
        return self.folder / name

    def launch(
        self, module: str, config: dict[str, Any], *, name: str = "job", **options: Any
    ) -> dict[str, Any]:
        """Run a job in the folder `name` of this step, its output to `log`; options are those of `launch`."""
        self.log(f"starting {module} on {options.get('num_processes', 1)} process(es)")
        started = time.monotonic()
        own_tick = options.pop("on_tick", None)

        def tick() -> None:
            self.tick()
            if own_tick:
                own_tick()

        report = launch(module, config, folder=self.folder / name, on_line=self.log, on_tick=tick, **options)
        self.log(f"{module} took {time.monotonic() - started:.1f} s")
        return report


@dataclass(frozen=True)
class Step:
    """One link of the chain: what it needs, what its fingerprint covers, and how it fills its folder."""

    name: str
    kind: Kind
    # the steps whose artifacts it reads
    needs: tuple[str, ...]
    # what of the spec decides about its output, resolved; sees the artifacts that it needs
    config: Callable[[ReleaseSpec, Artifacts], dict[str, Any]]
    # fills the folder with the kind's payload and returns the artifact's output
    build: Callable[[ReleaseSpec, Artifacts, Path, StepContext], dict[str, Any]]
    # our packages and modules, and installed distributions, whose change means to run again
    sources: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()
    # a killed attempt's folder is gone on with
    resumable: bool = False
    # says what is wrong with a sealed artifact beyond its own files, such as a destination that is gone
    check: Callable[[ReleaseSpec, Artifact], str | None] = lambda spec, artifact: None

    def fingerprint_record(self, spec: ReleaseSpec, artifacts: Artifacts) -> dict[str, Any]:
        """Return what goes in: digests of the inputs, resolved config, versions of the code that matters."""
        inputs = {name: artifacts[name] for name in self.needs}
        return {
            "step": self.name,
            "inputs": {name: artifact.digest for name, artifact in inputs.items()},
            "config": self.config(spec, inputs),
            "code": code_record(self.sources, self.distributions),
        }
