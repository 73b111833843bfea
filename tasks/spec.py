"""The release spec: all that a release is told, as nested models that also make the form in Prefect's UI."""

import difflib
import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bridge import check_layout
from tasks.errors import SpecError
from training.config_paths import PATHS, anchored

# what a release decides by itself
PLACES = (
    *("checkpoint.save", "checkpoint.load", "checkpoint.pretrained_checkpoint", "logger.metrics_path"),
    *("dataset.blend", "dataset.blend_per_split", "dataset.path_to_cache", "tokenizer.tokenizer_model"),
)


class Section(BaseModel):
    """A part of a spec: unknown names are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class DType(StrEnum):
    """In which precision logits are computed for a comparison."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class SourceSpec(Section):
    """The Hugging Face checkpoint that the release starts from."""

    uri: str = Field(min_length=1)
    """A folder, an s3:// address, or hf://organisation/name@revision."""


class DatasetSpec(Section):
    """The text that the model is trained on; some documents are held out to measure the loss."""

    inputs: list[str] = Field(min_length=1)
    """Files, folders, globs or URLs of text: JSONL and Parquet hold many documents, any other file is one."""
    text_key: str = "text"
    """The key of a JSONL line or column of a Parquet file that holds the text."""
    exclude: list[str] = Field(default_factory=list)
    """Names of files and folders below the inputs that are left out."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Read no more text than this; none reads all."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the documents whose loss is watched during training."""
    test_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the documents that only the verification reads."""

    @property
    def split(self) -> list[float]:
        """Fractions of train, validation and test."""
        return [
            1 - self.validation_fraction - self.test_fraction,
            self.validation_fraction,
            self.test_fraction,
        ]


class ParallelSpec(Section):
    """How a job is spread over processes: as many as tensor x pipeline x context x data parallel sizes."""

    tensor_model_parallel_size: int = Field(default=1, ge=1, le=64)
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1, le=256)
    """Stages that share the layers."""
    context_parallel_size: int = Field(default=1, ge=1, le=64)
    """Ranks that share each sequence."""
    expert_model_parallel_size: int = Field(default=1, ge=1, le=1024)
    """Ranks that share the experts; they are no more ranks, but those of the other sizes."""
    expert_tensor_parallel_size: int | None = Field(default=None, ge=1, le=64)
    """Ranks that share each expert; none takes the tensor parallel size."""
    data_parallel_size: int = Field(default=1, ge=1, le=4096)
    """Copies of the model, those of its experts aside."""

    @property
    def model_sizes(self) -> dict[str, int | None]:
        """The sizes that the model description has, under Megatron's names."""
        return self.model_dump(exclude={"data_parallel_size"})

    @property
    def num_processes(self) -> int:
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )


class TrainSpec(Section):
    """The training run: a recipe, changes to it, and how it is spread."""

    recipe: str = "continued_pretrain_config"
    """A recipe that `bridgeworks recipes` lists; its model section comes from the imported checkpoint."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes by dotted name, such as {"train.train_iters": 100, "optimizer.lr": 0.0001}."""
    parallel: ParallelSpec = ParallelSpec()
    """How the training job is spread."""
    timeout_minutes: float | None = Field(default=None, gt=0)
    """Stop the job after this long; none means never."""
    max_restarts: int = Field(default=2, ge=0, le=1000)
    """How often a job that crashed is started again from its last checkpoint before it has made a new one."""
    stop_grace_seconds: float = Field(default=25, ge=1, le=3600)
    """How long a cancelled job may take to save before it is killed; a Prefect worker waits 30 seconds."""

    @field_validator("overrides")
    @classmethod
    def _sizes_have_one_place(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        for size in ParallelSpec.model_fields:
            if f"model.{size}" in overrides:
                raise ValueError(f"model.{size} is set by train.parallel.{size}")
        return overrides

    @field_validator("overrides")
    @classmethod
    def _places_are_the_releases(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        for name in PLACES:
            if name in overrides:
                raise ValueError(f"{name} follows from the release's own steps and folders: leave it out")
        return overrides

    @field_validator("overrides")
    @classmethod
    def _numbers_are_numbers(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        """Read "1e-4" as a number, since YAML takes it for text."""
        return {name: _number(value) for name, value in overrides.items()}


class CheckSpec(Section):
    """The gates: Megatron's logits against those of transformers, and the loss on held-out text."""

    dtype: DType = DType.FLOAT32
    """Precision of the comparison; the thresholds follow from it."""
    num_prompts: int = Field(default=4, ge=1, le=1024)
    """Prompts that are compared, at every position."""
    prompt_length: int = Field(default=64, ge=2, le=65536)
    """Tokens of each prompt."""
    tensor_model_parallel_size: int = Field(default=1, ge=1, le=64)
    """Ranks that share each layer on Megatron's side of a check."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1, le=64)
    """Stages that share the layers on Megatron's side of a check."""
    expert_model_parallel_size: int = Field(default=1, ge=1, le=1024)
    """Ranks that share the experts on Megatron's side of a check, each expert whole."""
    loss_batches: int = Field(default=8, ge=1)
    """Sequences of held-out text whose loss is measured before and after."""
    max_loss_increase: float = Field(default=0.0, ge=0)
    """How much higher the held-out loss may be after training than before."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the prompts."""

    @property
    def model_sizes(self) -> dict[str, int]:
        """The parallel sizes, under Megatron's names."""
        return self.model_dump(include=set(check_layout.SIZES))

    @property
    def num_processes(self) -> int:
        return check_layout.num_ranks(self.model_sizes)


class PublishSpec(Section):
    """Where the release goes and under which name it is registered."""

    destination: str = Field(min_length=1)
    """A new folder or s3:// prefix; {name} and {digest} may stand in it, so that each release has its own."""
    registered_model: str | None = Field(default=None, pattern=r"^[^/:'\"]*$")
    """Name in MLflow's model registry, without / : or quotes; none takes the release's name."""
    alias: str = Field(default="released", pattern=r"^[a-z][a-z0-9_-]*$")
    """Alias that the new version gets in the registry; MLflow keeps `latest` and v1, v2, ... for itself."""
    max_shard_size: str = Field(default="5GB", pattern=r"^[1-9][0-9]*(KB|MB|GB)$")
    """Largest size of one safetensors file of the released checkpoint."""

    @field_validator("alias")
    @classmethod
    def _alias_is_free(cls, alias: str) -> str:
        if alias == "latest" or re.fullmatch(r"v[0-9]+", alias):
            raise ValueError("MLflow reserves latest and v1, v2, ...: choose another alias, such as released")
        return alias


class ReleaseSpec(Section):
    """A release: from which checkpoint, trained on what and how, checked how, published where."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Name of the release: lower-case letters, digits and dashes."""
    workspace: Path = Path("work")
    """Folder that keeps artifacts, logs and, unless MLFLOW_TRACKING_URI is set, the MLflow store."""
    source: SourceSpec
    dataset: DatasetSpec
    train: TrainSpec = TrainSpec()
    check: CheckSpec = CheckSpec()
    publish: PublishSpec

    @field_validator("workspace", mode="before")
    @classmethod
    def _workspace_is_here(cls, workspace: Any) -> Any:
        if "://" in str(workspace):
            raise ValueError(
                "an address, and artifacts, logs and locks need a disk: give a folder of this machine"
            )
        return workspace


def load_spec(path: str | Path, overrides: list[str] | None = None) -> ReleaseSpec:
    """Read a spec from YAML or JSON and apply overrides such as `check.num_prompts=2`.

    Relative paths in the file are meant from the file's folder, not from where the command is run.
    """
    file = Path(path)
    try:
        # as JSON has it, with names that are text and nothing that holds itself
        value = json.loads(json.dumps(yaml.safe_load(file.read_text()), default=str))
    except OSError as error:
        raise SpecError(f"cannot read the spec {file}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise SpecError(f"{file} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise SpecError(
            f"{file} holds {type(value).__name__}: a spec is a mapping with name, source, dataset, ..."
        )
    return absolute(parse_spec(override(value, overrides or [])), file.resolve().parent)


def parse_spec(value: dict[str, Any]) -> ReleaseSpec:
    """Check a spec's values; SpecError names the field, what was got and what is allowed, on one line."""
    try:
        return ReleaseSpec.model_validate(value)
    except ValidationError as error:
        unknown_first = sorted(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
        raise SpecError("; ".join(map(_explain, unknown_first[:3]))) from error


def _explain(details: Any) -> str:
    where = ".".join(map(str, details["loc"])) or "spec"
    if details["type"] == "extra_forbidden":
        known = _known_names(details["loc"][:-1])
        near = difflib.get_close_matches(str(details["loc"][-1]), known, n=1, cutoff=0.0)
        return f"no setting is called {where!r}: did you mean {near[0]!r}? allowed are {', '.join(known)}"
    if details["type"] == "missing":
        return f"{where} is missing"
    return f"{where} is {json.dumps(details['input'], default=str)[:200]}: {details['msg']}"


def _known_names(location: tuple[int | str, ...]) -> list[str]:
    section: Any = ReleaseSpec
    for name in location:
        section = section.model_fields[name].annotation
    return sorted(section.model_fields)


def override(value: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return the raw spec with `section.field=value` applied; values are read as YAML.

    Everything after `train.overrides.` is one dotted name of the training config.
    """
    result = json.loads(json.dumps(value, default=str))
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise SpecError(f"override {assignment!r} has no '=': write section.field=value")
        *sections, field = _split_name(name.strip())
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise SpecError(f"override {name!r}: {section!r} is a value, not a section")
        target[field] = _value(text)
    return result


def _value(text: str) -> Any:
    """Read JSON, since YAML takes 1e-4 for text; then YAML; what is neither, such as {name}-1, is text."""
    for read in (json.loads, yaml.safe_load):
        try:
            return read(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            continue
    return text


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _split_name(name: str) -> list[str]:
    prefix = "train.overrides."
    return ["train", "overrides", name.removeprefix(prefix)] if name.startswith(prefix) else name.split(".")


def absolute(spec: ReleaseSpec, folder: Path) -> ReleaseSpec:
    """Return the spec with every relative path taken from `folder`."""
    return spec.model_copy(
        update={
            "workspace": Path(anchored(str(spec.workspace), folder)),
            "source": spec.source.model_copy(update={"uri": anchored(spec.source.uri, folder)}),
            "dataset": spec.dataset.model_copy(
                update={"inputs": [anchored(text, folder) for text in spec.dataset.inputs]}
            ),
            "train": spec.train.model_copy(
                update={"overrides": {k: _override(k, v, folder) for k, v in spec.train.overrides.items()}}
            ),
            "publish": spec.publish.model_copy(
                update={"destination": anchored(spec.publish.destination, folder)}
            ),
        }
    )


def _override(name: str, value: Any, folder: Path) -> Any:
    return anchored(value, folder) if name in PATHS and isinstance(value, str) else value
