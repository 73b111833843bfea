"""Windows of profilers on one rank; what is written on a GPU is in tests/gpu/test_engine.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training.config import ProfilingConfig
from training.profiling import MemoryHistory, TorchProfiler


@pytest.fixture
def profiling(tmp_path):
    """A window from before iteration 3 until after it, on the only rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield ProfilingConfig(profile_step_start=3, profile_step_end=4, output=str(tmp_path / "profile"))
    torch.distributed.destroy_process_group()


def test_the_profiler_looks_at_its_window(profiling, tmp_path):
    window, run = TorchProfiler(profiling), SimpleNamespace(iteration=0)
    is_open = []
    window.before_training(run)
    for run.iteration in (1, 2, 3):
        is_open.append(window.is_open)
        window.after_step(run, None)
    assert is_open == [False, False, True]
    assert not window.is_open
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {
        "rank0.operations.txt",
        "rank0.trace.json.gz",
    }


@pytest.mark.parametrize(("done", "files"), [(1, []), (2, ["rank0.memory.pickle"])])
def test_a_failure_within_the_window_writes_the_memory_history(profiling, tmp_path, monkeypatch, done, files):
    """There is no GPU here, so that torch's recorder is another one."""
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("history"))
    window = MemoryHistory(profiling)
    window.before_training(SimpleNamespace(iteration=done))
    window.after_failure(None)
    assert [path.name for path in tmp_path.glob("profile/*")] == files
