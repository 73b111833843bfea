"""The published folder: release.json, the model card with its picture, and no secret in either."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_hf_checkpoint

from tasks import publish
from tasks.artifact import Kind, Store
from tasks.audit import verify_release
from tasks.errors import StoreError
from tasks.plan import changes
from tasks.release import CARD, LOSS_CURVE, RELEASE, parse_release
from tasks.spec import ReleaseSpec, parse_spec
from tasks.step import Artifacts, RunRecord, StepContext
from training.config import ConfigContainer
from training.metrics import append_metrics

GATE = {
    "gate": "logits",
    "passed": True,
    "metrics": {"max_abs": 1.5e-5},
    "thresholds": {"max_abs": 1e-4},
    "failures": [],
}


def spec_for(folder: Path, **source: str) -> ReleaseSpec:
    return parse_spec(
        {
            "name": "small",
            "workspace": str(folder / "work"),
            "source": {"uri": "hf://org/base@" + "c" * 40, **source},
            "dataset": {"inputs": ["/text"]},
            "publish": {"destination": str(folder / "release")},
        }
    )


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    """Sealed artifacts of all steps before publishing, as small as they can be."""
    store = Store(tmp_path / "store")
    splits = {"train": {"documents": 9, "tokens": 12345}}
    config = {**ConfigContainer().to_dict(), "data_parallel_size": 4, "num_processes": 4}
    source = {"uri": "hf://org/base@" + "c" * 40, "revision": "c" * 40}

    def one_file(name: str) -> Any:
        def fill(folder: Path) -> None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")

        return fill

    def trained(folder: Path) -> None:
        one_file("checkpoints/model.json")(folder)
        for iteration in range(1, 6):
            append_metrics(folder / "metrics.jsonl", {"iteration": iteration, "loss": 6.0 - iteration})
        append_metrics(folder / "metrics.jsonl", {"iteration": 5, "validation_loss": 1.2})

    def exported(folder: Path) -> None:
        make_hf_checkpoint(folder / "checkpoint", "llama")
        (folder / "checkpoint/README.md").write_text("the source's own card")

    steps: list[tuple[str, Kind, Any, dict[str, Any], dict[str, Any]]] = [
        ("fetch", Kind.SOURCE, one_file("checkpoint/config.json"), {}, source),
        ("import", Kind.MEGATRON_CHECKPOINT, one_file("checkpoint/model.json"), {}, {}),
        ("check_import", Kind.GATE_REPORT, one_file("report.json"), {}, {"gates": {"logits": GATE}}),
        ("build_dataset", Kind.DATASET, one_file("dataset/dataset.json"), {}, {"splits": splits}),
        ("train", Kind.TRAINING_RUN, trained, config, {}),
        ("export", Kind.HF_CHECKPOINT, exported, {}, {}),
        ("verify", Kind.GATE_REPORT, one_file("report.json"), {}, {"gates": {"logits": GATE}}),
    ]
    made = {}
    for name, kind, fill, settings, output in steps:
        record = {"step": name, "config": settings, "inputs": {}, "code": {}}

        def filled(folder: Path, fill: Any = fill, output: dict[str, Any] = output) -> dict[str, Any]:
            fill(folder)
            return output

        made[name] = store.build(name, kind, record, filled, name="small")
    return made


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    context = StepContext(RunRecord("small", folder / "run"), folder / "run/publish")
    return publish.build(spec, artifacts, folder, context)


def test_the_release_is_whole_and_says_where_it_came_from(artifacts: Artifacts, tmp_path: Path) -> None:
    output = build(spec_for(tmp_path), artifacts, tmp_path / "step")
    place = Path(output["address"])
    assert verify_release(str(place)) == []
    release = parse_release((place / RELEASE).read_text(), "here")
    assert release.digest == output["digest"]
    assert release.inputs["source"]["revision"] == "c" * 40
    assert release.inputs["source"]["digest"] == artifacts["fetch"].digest
    assert set(release.steps) == set(artifacts)
    assert release.gates["verify.logits"] == GATE
    assert release.code["lock_file_sha256"]
    exported = {path.name: path.read_bytes() for path in artifacts["export"].payload.iterdir()}
    published = {path.name: path.read_bytes() for path in place.iterdir()}
    assert set(published) == set(exported) | {RELEASE, LOSS_CURVE}
    assert all(published[name] == content for name, content in exported.items() if name != CARD)
    assert (tmp_path / "step/release" / RELEASE).read_text() == (place / RELEASE).read_text()


def test_the_model_card(artifacts: Artifacts, tmp_path: Path) -> None:
    card = (Path(build(spec_for(tmp_path), artifacts, tmp_path / "step")["address"]) / CARD).read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: org/base\n" in card
    assert f"![loss curve]({LOSS_CURVE})" in card
    assert "| train | 9 | 12,345 |" in card
    assert "| verify.logits: max_abs | 1.5e-05 | 0.0001 |" in card
    assert "| train.train_iters | 0 |" in card
    assert "| model.context_parallel_size | 1 |" in card
    assert "| data_parallel_size | 4 |" in card
    assert "expert_tensor_parallel_size" not in card
    assert "the source's own card" not in card


def test_the_picture_is_a_png_of_some_size(artifacts: Artifacts, tmp_path: Path) -> None:
    picture = (
        Path(build(spec_for(tmp_path), artifacts, tmp_path / "step")["address"]) / LOSS_CURVE
    ).read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[start : start + 4]) for start in (16, 20))
    assert (width, height) == (880, 495)
    assert len(picture) > 10_000


def test_building_again_gives_the_same_release(artifacts: Artifacts, tmp_path: Path) -> None:
    first = build(spec_for(tmp_path), artifacts, tmp_path / "one")
    second = build(spec_for(tmp_path), artifacts, tmp_path / "two")
    assert first == second


def test_delivery_is_checked_when_it_is_planned(artifacts: Artifacts, tmp_path: Path) -> None:
    spec = spec_for(tmp_path)
    output = build(spec, artifacts, tmp_path / "step")
    sealed = artifacts["export"].model_copy(update={"output": output})
    assert publish.delivered(spec, sealed) is None
    (tmp_path / "release" / RELEASE).unlink()
    assert "no release at" in str(publish.delivered(spec, sealed))


def test_a_secret_is_never_published(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_averysecretvalue")
    spec = spec_for(tmp_path)
    leaking = spec.model_copy(
        update={"dataset": spec.dataset.model_copy(update={"inputs": ["/text?key=hf_averysecretvalue"]})}
    )
    with pytest.raises(StoreError, match="HF_TOKEN") as caught:
        build(leaking, artifacts, tmp_path / "leak")
    assert "averysecret" not in str(caught.value)
    assert not (tmp_path / "release").exists()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an-unused-secret")
    build(spec, artifacts, tmp_path / "step")
    for path in [*(tmp_path / "release").iterdir(), *(tmp_path / "step").rglob("*")]:
        content = path.read_bytes() if path.is_file() else b""
        assert b"averysecret" not in content
        assert b"an-unused-secret" not in content
    assert json.loads((tmp_path / "release" / RELEASE).read_text())["name"] == "small"


def test_another_name_is_another_release(artifacts: Artifacts, tmp_path: Path) -> None:
    """Its card and its registered model say so; the model itself may be the same."""
    spec = spec_for(tmp_path)
    before, after = (
        publish.STEP.fingerprint_record(each, artifacts)
        for each in (spec, spec.model_copy(update={"name": "other"}))
    )
    assert changes(before, after) == ['config changed: name "small" -> "other"']
