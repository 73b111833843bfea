"""Checkpoints that the tests of bridge/ share; a test that changes one copies it first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_hf_checkpoint


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of `make_hf_checkpoint(folder, family, **settings)`, made once per setting."""
    made: dict[str, Path] = {}

    def get(family: str, **settings: Any) -> Path:
        key = f"{family} {sorted(settings.items())}"
        if key not in made:
            made[key] = make_hf_checkpoint(tmp_path_factory.mktemp(family) / "hf", family, **settings)
        return made[key]

    return get
