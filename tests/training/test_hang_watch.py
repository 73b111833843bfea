"""Ranks that really hang: the job ends by itself, as a crash, and names the one to blame."""

import json
import time
from pathlib import Path

import pytest
from process_groups import TESTS

from tasks.errors import JobCrashedError
from tasks.launch import launch
from training.hang_watch import HEARTBEATS
from training.heartbeat import DATA, OPTIMIZER, Heart, Heartbeat, guilty, stacks_file

TIMEOUT = 4.0
# from the start of the job; a job of two ranks takes about ten to come to its third iteration
LONGEST = 200
# the tree before the tests, whose folder bridge would hide the package
ENVIRONMENT = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def hang(tiny_config, tmp_path):
    def start(kind: str) -> tuple[str, Path]:
        config = tiny_config(
            **{
                "resilience.hang_timeout": TIMEOUT,
                "train.eval_interval": None,
                "checkpoint.save": str(tmp_path / "checkpoints"),
                "checkpoint.save_interval": 2,
            }
        )
        job = {"config": config.to_dict(), "hang": kind}
        with pytest.raises(JobCrashedError) as caught:
            launch(
                "training_jobs.hanging",
                job,
                folder=tmp_path / "job",
                num_processes=2,
                environment=ENVIRONMENT,
                timeout=LONGEST,
            )
        return str(caught.value), tmp_path / "job"

    return start


def test_a_rank_asleep_in_its_data_is_named_with_its_stack(hang):
    message, folder = hang("asleep")
    error = json.loads((folder / "report.json").read_text())["error"]
    assert (error["rank"], error["iteration"], error["phase"]) == (1, 3, DATA)
    assert not error["verdict"]
    assert "rank 1 (process " in message
    assert "hangs in data of iteration 3" in message
    assert "time.sleep(3600)" in message
    # the innocent one waits for the gradients, and has left its stack as well
    assert "all_reduce" in stacks_file(folder / HEARTBEATS, 0).read_text()
    log = (folder / "job.log").read_text()
    assert "rank 0 has not moved" in log
    assert "rank 1 has not moved" in log


def test_a_stopped_rank_is_named_and_ended(hang):
    message, folder = hang("stopped")
    error = json.loads((folder / "report.json").read_text())["error"]
    assert error["rank"] == 1
    assert error["iteration"] <= 3  # iterations are faster than heartbeats here
    assert "has given no sign of life for" in message
    # torchrun would wait for half a minute until it ends a stopped process
    assert time.time() - (folder / "report.json").stat().st_mtime < 20
    assert (folder.parent / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    pid = int(message.split("(process ")[1].split()[0])
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_rank_that_keeps_the_interpreter_is_named_with_its_stack(hang):
    message, folder = hang("busy")
    assert "rank 1 (process " in message
    assert "has given no sign of life for" in message
    assert "in search_without_end" in message
    assert time.time() - (folder / "report.json").stat().st_mtime < 20


def beat(rank, *, iteration=7, phase=OPTIMIZER, since=100.0, published=200.0):
    return Heartbeat(
        rank=rank,
        host="here",
        pid=1,
        parent=1,
        iteration=iteration,
        phase=phase,
        since=since,
        limited=True,
        hangs=True,
        published=published,
    )


@pytest.mark.parametrize(
    ("heartbeats", "expected"),
    [
        ([beat(0), beat(1, published=120.0), beat(2, iteration=6)], 1),
        ([beat(0), beat(1), beat(2, iteration=6)], 2),
        ([beat(0, since=90.0), beat(1), beat(2, phase=DATA)], 2),
        ([beat(0), beat(1, since=99.0), beat(2)], 1),
    ],
)
def test_who_is_to_blame(heartbeats, expected):
    assert guilty(heartbeats, alive_after=150.0).rank == expected


def test_the_first_iteration_and_long_phases_have_no_limit():
    heart = Heart()
    heart.beat(DATA)
    assert not heart.limited
    heart.is_warm = True
    heart.beat(DATA)
    assert heart.limited
    heart.beat("Checkpoints", limited=False)
    assert not heart.limited
    assert heart.beats == 3
