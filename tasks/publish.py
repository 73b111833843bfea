"""The step that publishes: model card and release.json, delivery, a version in MLflow's registry."""

import json
import os
from pathlib import Path
from typing import Any

from tasks.artifact import Artifact, FileEntry, Kind, list_files
from tasks.delivery import deliver, read_release, resolve
from tasks.model_card import model_card, write_loss_curve
from tasks.release import CARD, LOSS_CURVE, RELEASE, Release, refuse_secrets, release_digest
from tasks.spec import ReleaseSpec
from tasks.step import Artifacts, Step, StepContext
from tasks.train import METRICS_FILE
from training.metrics import read_metrics


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    """Write model card and release.json, deliver them with the exported checkpoint, register the model."""
    payload = folder / "release"
    payload.mkdir()
    exported = artifacts["export"]
    describe(spec, artifacts, payload)
    files = release_files(exported, payload)
    release = make_release(spec, artifacts, files, context)
    refuse_secrets({RELEASE: release.to_json(), CARD: (payload / CARD).read_text()}, dict(os.environ))
    address = resolve(spec.publish.destination, spec.name, release.digest)
    paths = {entry.path: path for entry, path in files.items()}
    deliver(
        release,
        paths,
        address,
        on_progress=lambda done, total: context.progress(done, total, "bytes published"),
    )
    (payload / RELEASE).write_text(release.to_json())
    context.log(f"published {len(files)} files, {release.bytes:,} bytes at {address}")
    version = register(spec, release, str(address), context)
    return {"address": str(address), "digest": release.digest, "model": model_name(spec), "version": version}


def describe(spec: ReleaseSpec, artifacts: Artifacts, payload: Path) -> None:
    """Write the model card and the loss curve."""
    training = artifacts["train"]
    write_loss_curve(payload / LOSS_CURVE, read_metrics(training.path / METRICS_FILE))
    card = model_card(
        name=spec.name,
        source=artifacts["fetch"].output,
        dataset=artifacts["build_dataset"].output,
        config=training_config(training),
        gates=gates(artifacts),
        model_config=json.loads((artifacts["export"].payload / "config.json").read_text()),
    )
    (payload / CARD).write_text(card)


def training_config(training: Artifact) -> dict[str, Any]:
    """Return the config of the training job, after the recipe and all overrides."""
    return training.record["config"]


def gates(artifacts: Artifacts) -> dict[str, Any]:
    """Return the verdict of every gate of the run, by step and name."""
    return {
        f"{step}.{name}": gate
        for step in ("check_import", "verify")
        for name, gate in artifacts[step].output["gates"].items()
    }


def release_files(exported: Artifact, payload: Path) -> dict[FileEntry, Path]:
    """Return every file of the release with where it lies now; weights are not copied for it."""
    prefix = f"{exported.payload.name}/"
    weights = {
        entry.model_copy(update={"path": entry.path.removeprefix(prefix)}): exported.path / entry.path
        for entry in exported.files
        if entry.path.startswith(prefix) and entry.path != prefix + CARD
    }
    return {**weights, **{entry: payload / entry.path for entry in list_files(payload)}}


def make_release(
    spec: ReleaseSpec, artifacts: Artifacts, files: dict[FileEntry, Path], context: StepContext
) -> Release:
    """Gather what release.json says."""
    entries = tuple(sorted(files, key=lambda entry: entry.path))
    return Release(
        name=spec.name,
        digest=release_digest(entries),
        inputs={
            name: _input(artifacts[step])
            for name, step in (("source", "fetch"), ("dataset", "build_dataset"))
        },
        spec=spec.model_dump(mode="json"),
        training_config=training_config(artifacts["train"]),
        code=context.record.code,
        gates=gates(artifacts),
        steps={name: _step(artifact) for name, artifact in artifacts.items()},
        identifiers=context.record.identifiers,
        files=entries,
    )


def _input(artifact: Artifact) -> dict[str, Any]:
    prefix = f"{artifact.payload.name}/"
    files = {
        each.path.removeprefix(prefix): each.sha256 for each in artifact.files if each.path.startswith(prefix)
    }
    return {**artifact.output, "digest": artifact.digest, "files": files}


def _step(artifact: Artifact) -> dict[str, Any]:
    return {
        "fingerprint": artifact.fingerprint,
        "digest": artifact.digest,
        "record": artifact.record,
        "provenance": artifact.provenance,
    }


def config(spec: ReleaseSpec, artifacts: Artifacts) -> dict[str, Any]:
    """Return what decides about the release beside its inputs: its name is in the card and the registry."""
    return {
        "name": spec.name,
        **spec.publish.model_dump(include={"destination", "registered_model", "alias"}),
    }


def model_name(spec: ReleaseSpec) -> str:
    return spec.publish.registered_model or spec.name


def register(spec: ReleaseSpec, release: Release, address: str, context: StepContext) -> str | None:
    """Register the release by reference under its alias and return its version; None if MLflow is away."""
    tags = {"source": release.inputs["source"]["uri"], "commit": str(release.code["commit"])}
    version = context.record.lineage.register_model(
        model_name(spec), address, release.digest, spec.publish.alias, tags
    )
    if version is None:
        context.log(
            f"MLflow did not answer in time: {model_name(spec)} is registered when it does, or not at all"
        )
    return version


def delivered(spec: ReleaseSpec, artifact: Artifact) -> str | None:
    """Say why a sealed release must be published again: it is not at its destination any more."""
    address = resolve(spec.publish.destination, spec.name, artifact.output["digest"])
    present = read_release(address)
    if present is None:
        return f"no release at {address} any more"
    return None if present.digest == artifact.output["digest"] else f"another release at {address}"


STEP = Step(
    name="publish",
    kind=Kind.RELEASE,
    needs=("fetch", "build_dataset", "import", "check_import", "train", "export", "verify"),
    config=config,
    build=build,
    sources=(__name__, "tasks.model_card", "tasks.release"),
    check=delivered,
)
