"""The step that tokenises the text into Megatron's indexed format, with documents held out."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from bridge.errors import InputError
from tasks.artifact import Artifact, Kind, fingerprint
from tasks.spec import DatasetSpec, ReleaseSpec
from tasks.step import Artifacts, Step, StepContext
from training.corpus import Corpus

SECRET_PARAMETER = re.compile(
    r"token|signature|secret|password|credential|api_?key|^(sig|key|auth)$", re.IGNORECASE
)


def build(spec: ReleaseSpec, artifacts: Artifacts, folder: Path, context: StepContext) -> dict[str, Any]:
    """Run the job that builds the datasets with the source's tokenizer."""
    job = {
        "inputs": spec.dataset.inputs,
        "exclude": spec.dataset.exclude,
        "max_bytes": spec.dataset.max_bytes,
        "split": spec.dataset.split,
        "text_key": spec.dataset.text_key,
        "tokenizer": str(artifacts["fetch"].payload),
        "output": str(folder / "dataset"),
    }
    report = context.launch("training.build_dataset", job)
    for name, split in report["splits"].items():
        context.log(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens")
    return report


def config(spec: ReleaseSpec, artifacts: dict[str, Artifact]) -> dict[str, Any]:
    """Return the settings, and which text it is, by the names, sizes and times of its files."""
    return {
        "split": spec.dataset.split,
        "max_bytes": spec.dataset.max_bytes,
        "text_key": spec.dataset.text_key,
        "text": text_identity(spec.dataset),
    }


def text_identity(dataset: DatasetSpec) -> dict[str, Any]:
    """Say which text the spec means right now, without reading it; a missing path is an InputError."""
    refuse_tokens(dataset.inputs)
    files = list(Corpus(dataset.inputs, dataset.exclude).files())
    return {
        "files": len(files),
        "bytes": sum(file.nbytes for file in files),
        "state": fingerprint({"files": [(file.path, file.nbytes, file.stamp) for file in files]}),
    }


def refuse_tokens(inputs: list[str]) -> None:
    """Refuse addresses that carry a token or a signature: spec, job file and release.json would show it."""
    for each in inputs:
        names = parse_qs(urlsplit(each).query, keep_blank_values=True) if "://" in each else {}
        if found := [name for name in names if SECRET_PARAMETER.search(name)]:
            raise InputError(
                f"an address of dataset.inputs has the parameter {found[0]}, a secret that the release's"
                " records would show: fetch the text first, or give credentials by the environment"
            )


STEP = Step(
    name="build_dataset",
    kind=Kind.DATASET,
    needs=("fetch",),
    config=config,
    build=build,
    sources=(
        "training.build_dataset",
        "training.corpus",
        "training.documents",
        "training.indexed_files",
        "training.indexed_writer",
        "training.shards",
        "training.slices",
        __name__,
    ),
    distributions=("tokenizers", "transformers", "megatron-core"),
)
