"""The record of a release in MLflow: one run per pipeline run, a child per attempt of a step.

Everything goes through an outbox, so MLflow may be slow or away: steps go on, and what could not be delivered
by the end is said. MLflow itself is imported by the outbox's thread.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.errors import StoreError
from tasks.outbox import Outbox, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH = 1000  # MLflow's own limit of metrics per call; of params it takes 100
CLOSE_SECONDS = 30.0


class Metric(NamedTuple):
    """One value of a curve; `time` in seconds since the epoch, so that delivering twice changes nothing."""

    name: str
    value: float
    step: int
    time: float


class StepRun:
    """One attempt of a step; this base class records nothing, for steps run outside of a flow."""

    run_id: str | None = None

    def log_metrics(self, metrics: Sequence[Metric]) -> None:
        """Add points to curves."""

    def log_params(self, params: dict[str, Any]) -> None:
        """Add settings, each once."""

    def log_input(self, name: str, address: str, digest: str) -> None:
        """Name a dataset or model that this step reads, by reference."""

    def set_tags(self, tags: dict[str, Any]) -> None:
        """Add or change tags."""

    def log_file(self, file: Path) -> None:
        """Keep a copy of a small file, such as a table or a picture."""

    def finish(self, status: str) -> None:
        """End the attempt: FINISHED, FAILED or KILLED."""


class Lineage:
    """The record of one pipeline run; this base class records nothing."""

    @property
    def identifiers(self) -> dict[str, Any] | None:
        """Tracking address, experiment and run id, as release.json has them."""
        return None

    def start_step(self, step: str, tags: dict[str, Any]) -> StepRun:
        """Start the run of one attempt of a step."""
        return StepRun()

    def register_model(
        self, name: str, address: str, digest: str, alias: str, tags: dict[str, str], *, timeout: float = 30
    ) -> str | None:
        """Register a model by reference and return its version; None if MLflow did not answer in time."""
        return None

    def finish(self, status: str, *, timeout: float = CLOSE_SECONDS) -> list[str]:
        """End the run and return, one line each, what could not be recorded."""
        return []


class MlflowLineage(Lineage):
    """Records in the store at `uri`; a store in the workspace if MLFLOW_TRACKING_URI is not set."""

    def __init__(self, name: str, workspace: Path, tags: dict[str, Any]) -> None:
        # MLflow's own patience is minutes per call; the outbox has patience of its own
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # standard output belongs to who reads it
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.absolute() / 'mlflow.db'}"
        self._name, self._workspace = name, workspace.absolute()
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self.run_id: str | None = None
        self._outbox = Outbox(_refused_for_good)
        self._outbox.put("opening the store", self._open)
        self._outbox.put("the run", lambda: self._start(tags))

    @property
    def identifiers(self) -> dict[str, Any]:
        """Wait a little for what is under way, then return tracking address, experiment and run id."""
        self.call("ids", lambda: None, timeout=15)
        return {
            "tracking_uri": without_password(self.uri),
            "experiment_id": self._experiment_id,
            "run_id": self.run_id,
        }

    def call(self, what: str, work: Callable[[], Any], timeout: float) -> Any:
        """Do `work` after everything that is queued and return its result, None if that takes too long."""
        try:
            return self._outbox.put(what, work).result(timeout)
        except (TimeoutError, CancelledError):
            return None
        except Exception as error:
            raise StoreError(f"MLflow refused {what}: {one_line(error)}") from error

    def start_step(self, step: str, tags: dict[str, Any]) -> StepRun:
        run = MlflowStepRun(self, step)
        self.send(f"run of {step}", lambda: run.start({"kind": "step", "step": step, **tags}))
        return run

    def register_model(
        self, name: str, address: str, digest: str, alias: str, tags: dict[str, str], *, timeout: float = 30
    ) -> str | None:
        def work() -> str:
            version = self._version_with(name, digest) or self._new_version(name, address, digest, tags)
            self.client.set_registered_model_alias(name, alias, version)
            return version

        return self.call(f"model {name}", work, timeout)

    def finish(self, status: str, *, timeout: float = CLOSE_SECONDS) -> list[str]:
        self.send("end of the run", lambda: self.client.set_terminated(self.run_id, status))
        return self._outbox.close(timeout)

    def send(self, what: str, work: Callable[[], Any]) -> None:
        """Queue work that uses `client`, `experiment_id` and `run_id`, which earlier work has set."""
        self._outbox.put(what, work)

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client; only work in the outbox may use it."""
        assert self._client, "the store is opened by the first delivery"
        return self._client

    @property
    def experiment_id(self) -> str:
        assert self._experiment_id, "the experiment is set by the first delivery"
        return self._experiment_id

    def _open(self) -> None:
        from mlflow import MlflowClient

        self._workspace.mkdir(parents=True, exist_ok=True)
        with _one_opens(self.uri):
            client = MlflowClient(self.uri)
            found = client.get_experiment_by_name(self._name)
            # artifacts are references; MLflow's default would be a folder where the command was run
            place = f"{self._workspace.as_uri()}/mlruns" if self.uri.startswith("sqlite:") else None
            self._experiment_id = (
                found.experiment_id if found else client.create_experiment(self._name, place)
            )
        self._client = client

    def _start(self, tags: dict[str, Any]) -> None:
        run = self.client.create_run(self.experiment_id, tags=_text({"kind": "pipeline", **tags}))
        self.run_id = run.info.run_id

    def _version_with(self, name: str, digest: str) -> str | None:
        """Look for a version that is this model, so that delivering twice registers once."""
        found = self.client.search_model_versions(f"name='{name}' and tags.digest='{digest}'")
        return str(max(int(version.version) for version in found)) if found else None

    def _new_version(self, name: str, address: str, digest: str, tags: dict[str, str]) -> str:
        """Register a reference; its tag "uri" is what to load, in every kind of store."""
        from mlflow.exceptions import MlflowException

        tags = _text({"uri": address, "digest": digest, "format": "hf", **tags})
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source, model_id = self._source(name, address, tags)
        version = self.client.create_model_version(name, source, self.run_id, tags, model_id=model_id)
        return str(version.version)

    def _source(self, name: str, address: str, tags: dict[str, str]) -> tuple[str, str | None]:
        """Return the address itself; a server refuses a path: an empty model's address and id."""
        if "://" in address:
            return address, None
        if not self.uri.startswith("http"):
            return Path(address).as_uri(), None
        model = self.client.create_logged_model(self.experiment_id, name, self.run_id, tags, model_type="llm")
        self.client.finalize_logged_model(model.model_id, "READY")
        return f"models:/{model.model_id}", model.model_id


class MlflowStepRun(StepRun):
    """A child run in MLflow; every call is queued in the lineage's outbox."""

    def __init__(self, lineage: MlflowLineage, step: str) -> None:
        self._lineage, self._step = lineage, step

    def start(self, tags: dict[str, Any]) -> None:
        """Create the run; done by the outbox before anything else of this run."""
        parent = {"mlflow.parentRunId": self._lineage.run_id, "mlflow.runName": self._step}
        run = self._lineage.client.create_run(self._lineage.experiment_id, tags=_text({**parent, **tags}))
        self.run_id = run.info.run_id

    def log_metrics(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), BATCH):
            batch = metrics[start : start + BATCH]
            self._send(f"{len(batch)} metrics", partial(self._log_batch, batch=batch))

    def _log_batch(self, client: "MlflowClient", batch: Sequence[Metric]) -> None:
        from mlflow.entities import Metric as Entity

        points = [Entity(point.name, point.value, int(point.time * 1000), point.step) for point in batch]
        client.log_batch(self.run_id, metrics=points)

    def log_params(self, params: dict[str, Any]) -> None:
        def work(client: "MlflowClient") -> None:
            from mlflow.entities import Param

            entries = [Param(name, str(value)[:6000]) for name, value in params.items()]
            for start in range(0, len(entries), 100):
                client.log_batch(self.run_id, params=entries[start : start + 100])

        self._send("settings", work)

    def log_input(self, name: str, address: str, digest: str) -> None:
        def work(client: "MlflowClient") -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            scheme = address.partition("://")[0] if "://" in address else "local"
            # MLflow's digest column is short; the whole digest is in the tag
            dataset = Dataset(name, digest[:36], scheme, json.dumps({"uri": address}))
            tags = [InputTag("mlflow.data.context", self._step), InputTag("digest", digest)]
            client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

        self._send(f"input {name}", work)

    def set_tags(self, tags: dict[str, Any]) -> None:
        def work(client: "MlflowClient") -> None:
            from mlflow.entities import RunTag

            client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in _text(tags).items()])

        self._send("tags", work)

    def log_file(self, file: Path) -> None:
        self._send(f"file {file.name}", lambda client: client.log_artifact(self.run_id, str(file)))

    def finish(self, status: str) -> None:
        self._send("end", lambda client: client.set_terminated(self.run_id, status))

    def _send(self, what: str, work: Callable[["MlflowClient"], None]) -> None:
        self._lineage.send(f"{what} of {self._step}", lambda: work(self._lineage.client))


def without_password(uri: str) -> str:
    """Return an address without user and password."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else uri


def _text(tags: dict[str, Any]) -> dict[str, str]:
    return {name: str(value)[:8000] for name, value in tags.items() if value is not None}


def _refused_for_good(error: Exception) -> bool:
    """Tell an answer that will not change (a wrong value) from a store that is away or busy."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return not isinstance(error, OSError)
    return 400 <= error.get_http_status_code() < 500 and error.get_http_status_code() not in (408, 429)


@contextmanager
def _one_opens(uri: str) -> Iterator[None]:
    """Let one process at a time open an SQLite store: two that migrate a new one break it for good."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    with Path(uri.removeprefix("sqlite:///") + ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
