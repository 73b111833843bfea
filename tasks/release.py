"""What a release says about itself: release.json, and the digest that names a release by its content."""

import json
import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.artifact import FileEntry, fingerprint
from tasks.errors import ArtifactError, StoreError

RELEASE = "release.json"
CARD = "README.md"
LOSS_CURVE = "loss_curve.png"
SECRET_NAME = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIAL)", re.IGNORECASE)
SHORTEST_SECRET = 8  # shorter values of such variables ("true", "none") are found everywhere


class Release(BaseModel):
    """The content of release.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str
    # sha256 over the paths and digests of all files but release.json
    digest: str
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    # source model and dataset: address, revision, digests
    inputs: dict[str, Any]
    spec: dict[str, Any]
    # of the training run, after the recipe and all overrides
    training_config: dict[str, Any]
    # commit, digests of the sources and of the lock file, versions of what was installed
    code: dict[str, Any]
    # the verdict of each gate with its metrics and thresholds
    gates: dict[str, Any]
    # each step's fingerprint, digest and provenance
    steps: dict[str, Any]
    # ids of the run in Prefect and MLflow
    identifiers: dict[str, Any]
    files: tuple[FileEntry, ...]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def release_digest(files: Iterable[FileEntry]) -> str:
    """Return the digest of a release that consists of `files`."""
    return fingerprint({entry.path: entry.sha256 for entry in files if entry.path != RELEASE})


def parse_release(text: str | bytes, where: str) -> Release:
    """Read release.json; ArtifactError if it is not one or contradicts itself."""
    try:
        release = Release.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(f"{where} is not a release.json: {' '.join(str(error).split())[:300]}") from error
    if release_digest(release.files) != release.digest:
        raise ArtifactError(f"{where}: its digest {release.digest} is not that of the files that it lists")
    return release


def refuse_secrets(texts: dict[str, str], environment: dict[str, str]) -> None:
    """Raise StoreError if a text holds the value of an environment variable that is named like a secret."""
    for variable, value in environment.items():
        # os.path, as Path.exists raises for a name that is too long, and its error would show the secret
        if not SECRET_NAME.search(variable) or len(value) < SHORTEST_SECRET or os.path.exists(value):  # noqa: PTH110
            continue
        for name, text in texts.items():
            if value in text:
                raise StoreError(
                    f"{name} would hold the value of {variable}: take it out of the spec or the paths"
                )
    for name, text in texts.items():
        if re.search(r"://[^/\s:@\"]+:[^/\s@\"]+@", text):
            raise StoreError(f"{name} would hold an address with user and password: take it out of the spec")
