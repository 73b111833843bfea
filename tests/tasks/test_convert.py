"""Import and export as steps of a release: killed, cancelled, and gone on with from the finished files."""

import filecmp
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_hf_checkpoint

from bridge.exporter import export_checkpoint
from bridge.importer import import_checkpoint
from tasks.artifact import Artifact, Kind
from tasks.errors import JobStoppedError
from tasks.plan import decide, store_of
from tasks.spec import ReleaseSpec, parse_spec
from tasks.step import StepContext
from tests.tasks.conversion_step import CHAIN, perform

SCRIPT = Path(__file__).with_name("conversion_step.py")
SHARD = "60KB"
STEPS = {step.name: step for step in CHAIN}
INPUTS = {
    "import": ("fetch", Kind.SOURCE, "checkpoint"),
    "export": ("train", Kind.TRAINING_RUN, "checkpoints"),
}
steps = pytest.mark.parametrize("name", INPUTS)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return what each step reads."""
    folder = tmp_path_factory.mktemp("ends")
    hf = make_hf_checkpoint(folder / "hf", "llama")
    return {"import": hf, "export": import_checkpoint(hf, folder / "megatron").path}


@pytest.fixture
def spec(workspace: Path, ends: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> ReleaseSpec:
    """A release whose source is fetched and whose training is done."""
    monkeypatch.setattr("bridge.chunk_plan.SMALL_CHECKPOINT", 0)
    nowhere = {"source": {"uri": "/nowhere"}, "dataset": {"inputs": ["/nowhere"]}}
    publish = {"destination": "/nowhere", "max_shard_size": SHARD}
    spec = parse_spec({"name": "small", "workspace": workspace, **nowhere, "publish": publish})
    for name, (step, kind, payload) in INPUTS.items():

        def fill(folder: Path, source: Path = ends[name], payload: str = payload) -> dict:
            shutil.copytree(source, folder / payload)
            return {}

        store_of(spec).build(step, kind, {"step": step}, fill, name=spec.name)
    return spec


def killed(spec: ReleaseSpec, name: str, when: str) -> None:
    """Perform a step in a process that is killed; nothing of it may look like a result."""
    (spec.workspace / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, SCRIPT, spec.workspace / "spec.json", name, when]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not list(spec.workspace.glob(f"store/{name}/*/artifact.json"))


def reason(spec: ReleaseSpec, name: str) -> str:
    store = store_of(spec)
    artifacts = {needed: store.newest(needed, spec.name) for needed in STEPS[name].needs}
    return decide(STEPS[name], spec, artifacts, store).reason


def assert_whole(artifact: Artifact, name: str, source: Path, folder: Path) -> None:
    """Compare an artifact's payload with what an undisturbed conversion writes."""
    artifact.verify()
    if name == "import":
        import_checkpoint(source, folder)
    else:
        export_checkpoint(source, folder, max_shard_size=SHARD)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = [path for path in artifact.payload.rglob("*") if path.is_file()]
    assert names == sorted(str(path.relative_to(artifact.payload)) for path in files)
    assert filecmp.cmpfiles(folder, artifact.payload, names, shallow=False)[0] == names


@steps
def test_a_killed_step_goes_on_from_its_finished_files(
    name: str, spec: ReleaseSpec, ends: dict[str, Path], tmp_path: Path
) -> None:
    killed(spec, name, "converting")
    assert reason(spec, name) == "not built yet; goes on from where a run was stopped"
    artifact = perform(spec, name)
    assert 0.2 * artifact.output["bytes"] < artifact.output["resumed"] < artifact.output["bytes"]
    assert_whole(artifact, name, ends[name], tmp_path / "whole")
    assert not list(spec.workspace.glob(f"store/{name}/*.partial"))


@steps
@pytest.mark.parametrize("restarted", [False, True], ids=["same boot", "restarted"])
def test_a_conversion_that_was_not_sealed_is_not_repeated_until_the_machine_restarts(
    name: str,
    restarted: bool,
    spec: ReleaseSpec,
    ends: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed(spec, name, "sealing")
    (partial,) = spec.workspace.glob(f"store/{name}/*.partial")
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("checkpoint/*")}
    if restarted:
        (tmp_path / "boot_id").write_text("another")
        monkeypatch.setattr("bridge.staging.BOOT_ID", tmp_path / "boot_id")
    artifact = perform(spec, name)
    kept = [n for n, time in times.items() if (artifact.payload / n).stat().st_mtime_ns == time]
    assert len(kept) == (0 if restarted else len(times))
    assert artifact.output["resumed"] == (0 if restarted else artifact.output["bytes"])
    assert_whole(artifact, name, ends[name], tmp_path / "whole")


class Cancelled(StepContext):
    """A context whose flow is cancelled when more than half of the step is done."""

    def progress(self, done: float, total: float, description: str) -> None:
        if done > 0.6 * total:
            raise JobStoppedError("the flow was cancelled")


class Broken(StepContext):
    """A context that fails at the same place."""

    def progress(self, done: float, total: float, description: str) -> None:
        if done > 0.6 * total:
            raise RuntimeError("broken")


@steps
@pytest.mark.parametrize(
    ("context", "error", "goes_on"), [(Cancelled, JobStoppedError, True), (Broken, RuntimeError, False)]
)
def test_a_cancelled_step_goes_on_and_one_that_failed_starts_over(
    name: str,
    context: type[StepContext],
    error: type[Exception],
    goes_on: bool,
    spec: ReleaseSpec,
) -> None:
    with pytest.raises(error):
        perform(spec, name, context)
    assert ("goes on" in reason(spec, name)) == goes_on
    assert bool(perform(spec, name).output["resumed"]) == goes_on
