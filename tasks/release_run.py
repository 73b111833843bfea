"""One run of the chain: decides about each step, performs it and keeps the record; free of Prefect."""

import time
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from bridge.job import write_json
from tasks.artifact import Artifact
from tasks.errors import JobStoppedError
from tasks.lineage import Metric, MlflowLineage, StepRun
from tasks.plan import Decision, decide, flatten, store_of
from tasks.spec import ReleaseSpec
from tasks.step import Artifacts, RunRecord, Step, StepContext, StepRecord

STOPPED_CLOSE_SECONDS = 2.0  # a signalled flow has 30 seconds in all, most of which its job may need to save


class ReleaseRun:
    """The state of one run: the artifacts so far and the record."""

    def __init__(self, spec: ReleaseSpec, prefect_flow_run_id: str | None = None) -> None:
        self.spec = spec
        self.store = store_of(spec)
        self.artifacts: Artifacts = {}
        started = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        folder = spec.workspace / "runs" / f"{started}-{uuid4().hex[:6]}"
        self.record = RunRecord(spec.name, folder, prefect_flow_run_id)

    def decide(self, step: Step) -> Decision:
        """Decide whether a step runs, from the artifacts that are there now."""
        return decide(step, self.spec, self.artifacts, self.store)

    def reuse(self, step: Step, decision: Decision) -> Artifact:
        """Take a step's artifact as it is."""
        assert decision.artifact, "a reused step has its artifact"
        return self._done(step, decision, decision.artifact, 0.0, StepRun())

    def perform(self, step: Step, decision: Decision, context: StepContext) -> Artifact:
        """Build a step's artifact; the first step that really does something opens the record in MLflow."""
        assert decision.record, "a step that can run knows what goes in"
        self._open_lineage()
        context.run = self.record.lineage.start_step(step.name, self._tags(step, decision))
        started = time.monotonic()
        try:
            artifact = self.store.build(
                step.name,
                step.kind,
                decision.record,
                lambda folder: step.build(self.spec, self.artifacts, folder, context),
                name=self.spec.name,
                provenance=lambda: self._provenance(context),
                resumable=step.resumable,
                rebuild=decision.rebuild,
                on_wait=lambda lock: context.progress(
                    0, 1, f"waiting for another run that builds this: {lock}"
                ),
            )
        except BaseException as error:
            context.run.finish(status_of(error))
            raise
        self._record_outcome(step, artifact, context)
        return self._done(step, decision, artifact, time.monotonic() - started, context.run)

    def finish(self, error: BaseException | None = None) -> list[str]:
        """Close the record; return, one line each, what MLflow did not take."""
        try:
            return self._close(error)
        finally:
            # MLflow's ids are known by now, if ever
            ended = {"error": str(error) if error else None, "status": status_of(error)}
            write_json(self.record.folder / "run.json", {**self.record.to_dict(), **ended})

    def _close(self, error: BaseException | None) -> list[str]:
        stopped = error is not None and status_of(error) == "KILLED"
        options = {"timeout": STOPPED_CLOSE_SECONDS} if stopped else {}
        return self.record.lineage.finish(status_of(error), **options)

    def _open_lineage(self) -> None:
        if not isinstance(self.record.lineage, MlflowLineage):
            code = self.record.code
            tags = {
                "name": self.spec.name,
                "mlflow.runName": self.record.folder.name,
                "prefect.flow_run_id": self.record.prefect_flow_run_id,
                "git.commit": code["commit"],
                "git.modified": code["modified"],
                "lock_file.sha256": code["lock_file_sha256"],
                "folder": self.record.folder,
            }
            self.record.lineage = MlflowLineage(self.spec.name, self.spec.workspace, tags)

    def _tags(self, step: Step, decision: Decision) -> dict[str, Any]:
        inputs = {f"input.{name}.digest": self.artifacts[name].digest for name in step.needs}
        return {"reason": decision.reason, **inputs}

    def _record_outcome(self, step: Step, artifact: Artifact, context: StepContext) -> None:
        for name in step.needs:
            context.run.log_input(name, str(self.artifacts[name].payload), self.artifacts[name].digest)
        now = time.time()
        numbers = {
            name: value for name, value in flatten(artifact.output).items() if type(value) in (int, float)
        }
        context.run.log_metrics([Metric(f"output.{name}", value, 0, now) for name, value in numbers.items()])
        context.run.set_tags(
            {
                "artifact.path": artifact.path,
                "artifact.digest": artifact.digest,
                "artifact.fingerprint": artifact.fingerprint,
            }
        )
        context.run.finish("FINISHED")

    def _provenance(self, context: StepContext) -> dict[str, Any]:
        return {
            "code": {name: self.record.code[name] for name in ("commit", "modified", "lock_file_sha256")},
            "run_folder": str(self.record.folder),
            "prefect_flow_run_id": self.record.prefect_flow_run_id,
            "mlflow_run_id": context.run.run_id,
        }

    def _done(
        self, step: Step, decision: Decision, artifact: Artifact, seconds: float, run: StepRun
    ) -> Artifact:
        self.artifacts[step.name] = artifact
        self.record.steps.append(
            StepRecord(
                step.name, decision.action, decision.reason, seconds, artifact.path, artifact.digest, run
            )
        )
        return artifact


def status_of(error: BaseException | None) -> str:
    """Return MLflow's word for how a run ended."""
    if error is None:
        return "FINISHED"
    stopped = isinstance(error, JobStoppedError) or not isinstance(error, Exception)
    return "KILLED" if stopped else "FAILED"
