"""The demo's spec: it suits the machine that it is written on."""

from pathlib import Path

import pytest

from flows import demo
from tasks.gpus import NONE, Gpus
from tasks.spec import load_spec


@pytest.mark.parametrize(
    ("gpus", "ranks"), [(None, 2), (NONE, 2), (Gpus(1, (9, 0)), 1), (Gpus(8, (9, 0)), 2)], ids=str
)
def test_a_machine_with_one_gpu_runs_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: Gpus | None, ranks: int
) -> None:
    monkeypatch.setattr(demo, "gpus_of_jobs", lambda: gpus)
    demo.write_spec(tmp_path / "demo.yaml")
    spec = load_spec(tmp_path / "demo.yaml")
    assert spec.train.parallel.num_processes == spec.check.num_processes == ranks
