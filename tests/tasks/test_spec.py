"""The release spec: reading, overriding, and errors that say what to do on one line."""

from pathlib import Path

import pytest
import yaml

from bridge.provider import GPTModelProvider
from tasks.errors import SpecError
from tasks.spec import ReleaseSpec, load_spec, parse_spec

MINIMAL = {
    "name": "tiny",
    "source": {"uri": "checkpoints/tiny"},
    "dataset": {"inputs": ["text", "s3://bucket/text"]},
    "publish": {"destination": "out"},
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_relative_paths_are_meant_from_the_file(file) -> None:
    spec = load_spec(file)
    assert spec.source.uri == str(file.parent / "checkpoints/tiny")
    assert spec.dataset.inputs == [str(file.parent / "text"), "s3://bucket/text"]
    assert spec.workspace == file.parent / "work"


def test_overrides(file) -> None:
    spec = load_spec(
        file,
        [
            "train.overrides.optimizer.lr=1e-4",
            "train.parallel.tensor_model_parallel_size=2",
            "train.parallel.data_parallel_size=2",
            "publish.alias=candidate",
        ],
    )
    assert spec.train.overrides == {"optimizer.lr": 1e-4}
    assert spec.train.parallel.num_processes == 4
    assert spec.train.parallel.model_sizes["expert_tensor_parallel_size"] is None
    assert spec.publish.alias == "candidate"


def test_an_override_that_is_no_yaml_is_text(file) -> None:
    spec = load_spec(file, ["publish.destination={name}-{digest}"])
    assert spec.publish.destination == str(file.parent / "{name}-{digest}")


def test_ranks_of_all_sizes(file) -> None:
    """Experts lie on the ranks that are there; a check has as few as hold both kinds of layers."""
    sizes = {"tensor_model": 2, "pipeline_model": 3, "context": 2, "expert_model": 4, "data": 5}
    given = [f"train.parallel.{name}_parallel_size={size}" for name, size in sizes.items()]
    checked = {"tensor_model": 2, "pipeline_model": 3, "expert_model": 4}
    given += [f"check.{name}_parallel_size={size}" for name, size in checked.items()]
    spec = load_spec(file, given)
    assert spec.train.parallel.num_processes == 2 * 3 * 2 * 5
    assert spec.check.num_processes == 3 * 4
    assert spec.train.parallel.model_sizes.keys() < GPTModelProvider.__dataclass_fields__.keys()


def test_yaml_scientific_notation_is_a_number() -> None:
    value = yaml.safe_load("{optimizer.lr: 1e-4, scheduler.lr_decay_style: cosine}")
    spec = parse_spec({**MINIMAL, "train": {"overrides": value}})
    assert spec.train.overrides == {"optimizer.lr": 1e-4, "scheduler.lr_decay_style": "cosine"}


def test_paths_among_the_overrides_are_taken_from_the_specs_folder(file) -> None:
    spec = load_spec(file, ["train.overrides.logger.tensorboard_dir=tb", "train.overrides.optimizer.lr=1e-4"])
    assert spec.train.overrides == {"logger.tensorboard_dir": str(file.parent / "tb"), "optimizer.lr": 1e-4}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.recipe=x", "no setting is called 'trian': did you mean 'train'"),
        ("train.recip=x", "no setting is called 'train.recip': did you mean 'recipe'"),
        ("check.num_prompts=0", "check.num_prompts is 0: Input should be greater than or equal to 1"),
        ("check.dtype=float8", "check.dtype is \"float8\": Input should be 'float32' or 'bfloat16'"),
        ("train.overrides.model.tensor_model_parallel_size=2", "is set by train.parallel.tensor_model"),
        ("train.overrides.model.expert_tensor_parallel_size=2", "is set by train.parallel.expert_tensor"),
        ("train.overrides.checkpoint.save=x", "checkpoint.save follows from the release's own steps"),
        ("train.overrides.dataset.blend=[x]", "dataset.blend follows from the release's own steps"),
        ("train.parallel.context_parallel_size=0", "train.parallel.context_parallel_size is 0"),
        ("publish.alias=latest", "choose another alias"),
        ("name=A B", 'name is "A B"'),
        ("name=2026-13-45x: y: [", 'name is "2026-13-45x: y: ["'),
        ("check.max_loss_increase=Infinity", "check.max_loss_increase is Infinity"),
        ("publish.registered_model=team/model", 'publish.registered_model is "team/model"'),
        ("publish.registered_model=o'hara", 'publish.registered_model is "o\'hara"'),
        ("publish.max_shard_size=0GB", 'publish.max_shard_size is "0GB"'),
        ("name.first=x", "'name' is a value, not a section"),
        ("name", "has no '='"),
    ],
)
def test_bad_overrides(file, override, message) -> None:
    with pytest.raises(SpecError) as error:
        load_spec(file, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds list"),
        ("a: [", "neither YAML nor JSON"),
        ("a: 2026-13-45", "neither YAML nor JSON: month must be"),
        ("2026-01-02: a", "neither YAML nor JSON: keys must be str"),
        ("a: &a [*a]", "neither YAML nor JSON: Circular"),
        ("[" * 5000, "neither YAML nor JSON: maximum recursion"),
        ("name: tiny", "source is missing"),
    ],
)
def test_bad_files(tmp_path, text, message) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_spec(path)


def test_missing_file(tmp_path) -> None:
    with pytest.raises(SpecError, match="cannot read the spec"):
        load_spec(tmp_path / "none.yaml")


def test_every_field_has_a_description_for_the_form() -> None:
    schema = ReleaseSpec.model_json_schema()
    sections = [section for section in schema["$defs"].values() if "properties" in section]
    fields = [(s["title"], n, f) for s in [schema, *sections] for n, f in s["properties"].items()]
    assert [
        f"{title}.{name}"
        for title, name, field in fields
        if not field.get("description") and "$ref" not in field
    ] == []
