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

from bridge.ledger import DIFFERENT, compare_ledgers, ledger
from training.checkpoint_folders import complete_checkpoints
from training.metrics import read_metrics
from training.pretrain import EXIT_STOPPED

ITERATIONS = 40
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
        settings = {"config": config.to_dict(), "load": str(load), "output": str(self.output)}
        self.job.write_text(
            json.dumps({**settings, "metrics": str(self.metrics), "report": str(self.report)})
        )

    def start(self, *before: str) -> subprocess.Popen:
        self.lines_before = self.lines()
        return subprocess.Popen(
            [*before, sys.executable, "-m", "bridge.job", "training.pretrain", str(self.job)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdout=(self.folder / "log.txt").open("ab"),
            stderr=subprocess.STDOUT,
        )

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()[-3000:]

    def wait_for(self, condition, process: subprocess.Popen) -> Any:
        deadline = time.monotonic() + 120
        while not (found := condition()):
            assert process.poll() is None, self.log()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return found

    def catch_writer(self, process: subprocess.Popen) -> psutil.Process:
        """Stop a writer before it is done; several checkpoints may be sealed before one is caught."""

        # imports and the compiler start processes too; after an iteration there are writers only
        self.wait_for(lambda: self.lines() >= self.lines_before + 2, process)

        def caught() -> psutil.Process | None:
            # one that is stopped in its first instant has not yet asked to be killed with its parent
            if not list(self.output.glob("iter_*.partial/*.distcp")):
                return None
            for writer in psutil.Process(process.pid).children():
                try:
                    writer.suspend()
                    if writer.status() == psutil.STATUS_STOPPED:
                        return writer
                except psutil.NoSuchProcess:
                    continue
            return None

        return self.wait_for(caught, process)

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
        job = json.loads(self.job.read_text())
        job["config"]["checkpoint"]["fall_back_if_damaged"] = True
        self.job.write_text(json.dumps(job))

    def names(self) -> list[str]:
        return [path.name for path in complete_checkpoints(self.output)]

    def lines(self) -> int:
        return self.metrics.read_bytes().count(b"\n") if self.metrics.is_file() else 0

    def iterations(self) -> int:
        return len(read_metrics(self.metrics))


@pytest.fixture(scope="module")
def training(tiny_config, imported, tmp_path_factory):
    def make(name: str, **overrides: Any) -> Training:
        return Training(tmp_path_factory.mktemp(name), tiny_config(**SETTINGS, **overrides), imported)

    return make


@pytest.fixture(scope="module")
def undisturbed(training) -> Training:
    made = training("undisturbed")
    assert made.start().wait(120) == 0, made.log()
    return made


def test_a_run_survives_what_happens_to_its_writers(training, undisturbed):
    run = training("disturbed", **{"checkpoint.async_save": True})

    # the run is killed while it trains beside a writer
    process = run.start()
    run.catch_writer(process)
    sealed, reached = run.names(), run.iterations()
    run.wait_for(lambda: run.iterations() >= reached + 2, process)
    assert run.names() == sealed
    assert list(run.output.glob("iter_*.partial"))
    assert run.is_locked()
    process.kill()
    process.wait(60)
    assert run.names() == sealed

    # a writer is killed: that is an error of the run, and what it wrote is gone
    process = run.start()
    writer = run.catch_writer(process)
    sealed = run.names()
    writer.kill()
    assert process.wait(60) == 1
    assert "was killed" in json.loads(run.report.read_text())["error"]["message"]
    assert run.names() == sealed
    assert not list(run.output.glob("iter_*.partial"))

    # the run is told to stop while a writer is at work: that one ends, and another one writes the last state
    process = run.start()
    writer = run.catch_writer(process)
    process.send_signal(signal.SIGTERM)
    writer.resume()
    assert process.wait(60) == EXIT_STOPPED, run.log()
    stopped = json.loads(run.report.read_text())["iteration"]
    assert run.names()[-1] == f"iter_{stopped:07d}"
    assert (run.output / "latest_checkpointed_iteration.txt").read_text() == f"{stopped}\n"
    assert not list(run.output.glob("iter_*.partial"))

    # a disk changes a bit of a weight: the run does not go on from it unknowingly
    tensors = sorted((run.output / run.names()[-1]).glob("*.distcp"))[0]
    with tensors.open("r+b") as file:
        file.seek(tensors.stat().st_size // 2)
        changed = file.read(1)[0] ^ 1
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([changed]))
    assert run.start().wait(60) == 2, run.log()
    message = json.loads(run.report.read_text())["error"]["message"]
    assert f"{run.names()[-1]} is damaged: {tensors.name} is not what was written" in message
    run.allow_damage()
    assert run.start().wait(120) == 0, run.log()
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
    assert process.wait(120) == 1
    assert "File too large" in json.loads(run.report.read_text())["error"]["message"]
    assert run.names() == []
    assert not list(run.output.glob("iter_*"))
