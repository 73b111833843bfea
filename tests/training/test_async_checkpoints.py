"""A run whose checkpoints are written beside it, with the writer stopped, killed and out of space."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from process_groups import TESTS

from bridge.ledger import DIFFERENT, compare_ledgers, ledger
from training.checkpoint_folders import complete_checkpoints, folder_of
from training.metrics import read_metrics
from training.pretrain import EXIT_STOPPED

ITERATIONS = 40
LONGEST = 240  # seconds, to end a hang
# the tree before the tests, whose folder bridge would hide the package
ENVIRONMENT = {
    "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}
SETTINGS = {
    "train.train_iters": ITERATIONS,
    "train.eval_interval": None,
    "checkpoint.save_interval": 5,
    "model.hidden_dropout": 0.1,
    "mixed_precision.bf16": True,
}


class Training:
    """A run of one rank that is started several times."""

    def __init__(self, folder: Path, config: Any, load: Path) -> None:
        self.folder, self.output, self.metrics = folder, folder / "run", folder / "metrics.jsonl"
        self.report = folder / "report.json"
        self.job = folder / "job.json"
        settings = {
            "config": config.to_dict(),
            "load": str(load),
            "output": str(self.output),
            "wait_at": None,
        }
        self.job.write_text(
            json.dumps({**settings, "metrics": str(self.metrics), "report": str(self.report)})
        )

    def start(self, *before: str, hold: int | None = None) -> subprocess.Popen:
        """Start it; the writer of the checkpoint of iteration `hold` stops in the middle."""
        self.change_job(hold=None if hold is None else folder_of(self.output, hold).name)
        return subprocess.Popen(
            [*before, sys.executable, "-m", "bridge.job", "training_jobs.held", str(self.job)],
            env={**os.environ, **ENVIRONMENT},
            stdout=(self.folder / "log.txt").open("ab"),
            stderr=subprocess.STDOUT,
        )

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()[-3000:]

    def wait_for(self, condition, process: subprocess.Popen) -> Any:
        deadline = time.monotonic() + LONGEST
        while not (found := condition()):
            assert process.poll() is None, self.log()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return found

    def stopped_writer(self, process: subprocess.Popen) -> psutil.Process:
        """Wait for the writer that is held."""

        def stopped() -> list[psutil.Process]:
            return [each for each in psutil.Process(process.pid).children() if is_stopped(each)]

        (writer,) = self.wait_for(stopped, process)
        return writer

    def is_locked(self) -> bool:
        """Say whether another run would be refused."""
        descriptor = os.open(self.output, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def allow_damage(self) -> None:
        config = json.loads(self.job.read_text())["config"]
        config["checkpoint"]["fall_back_if_damaged"] = True
        self.change_job(config=config)

    def change_job(self, **changes: Any) -> None:
        self.job.write_text(json.dumps({**json.loads(self.job.read_text()), **changes}))

    def names(self) -> list[str]:
        return [path.name for path in complete_checkpoints(self.output)]

    def iteration(self) -> int:
        """Return the last iteration that the metrics know."""
        return max((line["iteration"] for line in read_metrics(self.metrics)), default=0)


def is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def names_of(*iterations: int) -> list[str]:
    return [f"iter_{iteration:07d}" for iteration in iterations]


@pytest.fixture(scope="module")
def training(tiny_config, imported, tmp_path_factory):
    def make(name: str, **overrides: Any) -> Training:
        return Training(tmp_path_factory.mktemp(name), tiny_config(**SETTINGS, **overrides), imported)

    return make


@pytest.fixture(scope="module")
def undisturbed(training) -> Training:
    made = training("undisturbed")
    assert made.start().wait(LONGEST) == 0, made.log()
    return made


def test_a_run_survives_what_happens_to_its_writers(training, undisturbed):
    run = training("disturbed", **{"checkpoint.async_save": True})

    # the run is killed while it trains beside a writer, until the next checkpoint is due
    process = run.start(hold=10)
    run.stopped_writer(process)
    run.wait_for(lambda: run.iteration() >= 14, process)
    assert run.names() == names_of(5)
    assert list(run.output.glob("iter_0000010.*.partial/*.distcp"))
    assert run.is_locked()
    process.kill()
    process.wait(LONGEST)
    assert run.names() == names_of(5)

    # a writer is killed: that is an error of the run, and what it wrote is gone
    process = run.start(hold=15)
    run.stopped_writer(process).kill()
    assert process.wait(LONGEST) == 1
    assert "was killed" in json.loads(run.report.read_text())["error"]["message"]
    assert run.names() == names_of(5, 10)
    assert not list(run.output.glob("iter_*.partial"))

    # the run is told to stop while a writer is at work: that one ends, and another one writes the last state
    process = run.start(hold=25)
    writer = run.stopped_writer(process)
    process.send_signal(signal.SIGTERM)
    writer.resume()
    assert process.wait(LONGEST) == EXIT_STOPPED, run.log()
    stopped = json.loads(run.report.read_text())["iteration"]
    assert 25 < stopped <= 30
    assert run.names()[-2:] == names_of(25, stopped)
    assert (run.output / "latest_checkpointed_iteration.txt").read_text() == f"{stopped}\n"
    assert not list(run.output.glob("iter_*.partial"))

    # a disk changes a bit of a weight: the run does not go on from it unknowingly
    tensors = sorted((run.output / run.names()[-1]).glob("*.distcp"))[0]
    with tensors.open("r+b") as file:
        file.seek(tensors.stat().st_size // 2)
        changed = file.read(1)[0] ^ 1
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([changed]))
    assert run.start().wait(LONGEST) == 2, run.log()
    message = json.loads(run.report.read_text())["error"]["message"]
    assert f"{run.names()[-1]} is damaged: {tensors.name} is not what was written" in message
    run.allow_damage()
    assert run.start().wait(LONGEST) == 0, run.log()
    assert (run.output / f"{tensors.parent.name}.damaged").is_dir()
    assert not run.is_locked()
    for key in ("loss", "grad_norm"):
        found, expected = (
            {line["iteration"]: line[key] for line in read_metrics(each.metrics)}
            for each in (run, undisturbed)
        )
        assert found == expected, key
    last = [each.output / f"iter_{ITERATIONS:07d}" for each in (run, undisturbed)]
    assert not compare_ledgers(*map(ledger, last)).names(DIFFERENT)


def test_no_space_for_a_file_is_an_error_of_the_run(training):
    """The kernel refuses files of more than 200 KiB, as a full disk would."""
    run = training("full", **{"checkpoint.async_save": True})
    process = run.start("prlimit", f"--fsize={200 << 10}")
    assert process.wait(LONGEST) == 1
    assert "File too large" in json.loads(run.report.read_text())["error"]["message"]
    assert run.names() == []
    assert not list(run.output.glob("iter_*"))
