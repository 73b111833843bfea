"""The launcher of jobs: one torchrun process group that can neither outlive its launcher nor lose its log.

    report = launch("training.pretrain", config, folder=run_folder / "train", num_processes=2)

Ways a job could be left behind, and what ends it: the launching code raises or is signalled (`_stop` asks the
agent by SIGTERM, waits, then kills every process that carries this job's mark, for ranks live in sessions of
their own); the launching process is killed (PR_SET_PDEATHSIG on the agent, and by `bridge.job` on each rank);
the launch runs in a thread that no signal reaches (`job_guard` in the main thread halts it).
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bridge.errors import InputError
from bridge.job import MARK, PR_SET_PDEATHSIG, write_json
from tasks.errors import JobCrashedError, JobError, JobSavedError, JobStoppedError

POLL_SECONDS = 0.2
TAIL_LINES = 30

# bound before any fork: a child of a threaded process must not load libraries
_libc = ctypes.CDLL(None)
_halts: dict[str, threading.Event] = {}


def launch(
    module: str,
    config: dict[str, Any],
    *,
    folder: Path,
    num_processes: int = 1,
    timeout: float | None = None,
    grace: float = 25,
    on_line: Callable[[str], None] | None = None,
    on_tick: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `MODULE.main(config)` in its own processes and return its report.

    `folder` gets job.json (the config), job.log (all output) and, unless the config names another place,
    report.json. `on_line` is called with each line of output and `on_tick` about five times a second, both in
    the calling thread. `timeout` and `grace` are in seconds; `grace` is how long a job that is told to stop
    may take to save. What a job refuses (exit code 2) is raised as InputError with its own message, any other
    verdict of it as JobError, a halt as JobStoppedError, a job that was told to stop and has saved as
    JobSavedError, and everything else as JobCrashedError with the job's error or the last lines of its log.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    config = {"report": str(folder / "report.json"), **config}
    report, log, job_file = Path(config["report"]), folder / "job.log", folder / "job.json"
    report.unlink(missing_ok=True)
    write_json(job_file, config)
    job = uuid.uuid4().hex
    halt = _halts.setdefault(job, threading.Event())
    process = None
    try:
        with log.open("wb") as output, log.open("rb") as lines:
            variables = _environment(job, num_processes, grace, environment or {})
            process = _start(_command(module, job_file, num_processes), folder, output, variables)
            tail = _watch(process, lines, halt, timeout, module, on_line, on_tick)
        return _result(module, process.returncode, report, log, tail)
    finally:
        del _halts[job]
        if process is not None:
            _stop(process, job, grace)


def halt_jobs() -> None:
    """Stop every job that this process runs, in whatever thread; their launches raise JobStoppedError."""
    for halt in list(_halts.values()):
        halt.set()


@contextmanager
def job_guard() -> Iterator[None]:
    """Halt the jobs of other threads when the body ends by an exception, a signal included.

    To be used in the main thread around code that launches jobs in threads (`task.submit`).
    """
    try:
        yield
    except BaseException:
        halt_jobs()
        raise


def _command(module: str, job_file: Path, num_processes: int) -> list[str]:
    job = ["-m", "bridge.job", module, str(job_file)]
    if num_processes == 1:
        return [sys.executable, *job]
    # No restarts by torchrun: the flow starts the whole job again, from its last complete checkpoint.
    options = ["--standalone", f"--nproc-per-node={num_processes}", "--max-restarts=0"]
    # torchrun's own place for its notes would be a new folder in /tmp for every job
    options += [f"--log-dir={job_file.with_name('torchrun')}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *job]


def _environment(job: str, num_processes: int, grace: float, extra: Mapping[str, str]) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // num_processes)),
        # what Megatron and torch warn of at every start would bury what a job has to say
        "PYTHONWARNINGS": "ignore::UserWarning,ignore::FutureWarning,ignore::DeprecationWarning",
        # torchrun kills ranks after 30 seconds by itself; the grace given here decides instead
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(grace) + 5),
    }
    return {**defaults, **os.environ, **extra, MARK: job}


def _start(
    command: list[str], folder: Path, output: BinaryIO, variables: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start the agent in a session of its own, with its output in a file, so that nobody can block it."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=dying_with_this_process(),
    )


def dying_with_this_process() -> Callable[[], None]:
    """Return what a child must call before exec so that the kernel kills it when this process dies.

    The kernel means the thread that forks: it must be the one that waits for the child.
    """
    launcher = os.getpid()

    def bind() -> None:
        if sys.platform == "linux":
            _libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != launcher:
            os._exit(1)

    return bind


def _watch(
    process: subprocess.Popen[bytes],
    lines: BinaryIO,
    halt: threading.Event,
    timeout: float | None,
    module: str,
    on_line: Callable[[str], None] | None,
    on_tick: Callable[[], None] | None,
) -> list[str]:
    """Pass the job's output on until it has ended; return its last lines."""
    deadline = time.monotonic() + timeout if timeout else None
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    follower = LineFollower(lines)
    ended = False
    while not ended:
        ended = process.poll() is not None
        for line in follower.read(last=ended):
            tail.append(line)
            if on_line:
                on_line(line)
        if on_tick:
            on_tick()
        if halt.is_set():
            raise JobStoppedError(f"{module} was stopped because its flow was cancelled")
        if deadline and time.monotonic() > deadline:
            raise JobError(f"{module} took longer than {timeout:g} seconds and was stopped")
        if not ended:
            halt.wait(POLL_SECONDS)
    return list(tail)


class LineFollower:
    """Reads the whole lines that a growing file has got since the last call."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.rest = b""

    def read(self, *, last: bool = False) -> list[str]:
        """Return the new lines; with `last`, an unfinished one too."""
        *lines, self.rest = (self.rest + self.file.read()).split(b"\n")
        if last and self.rest:
            lines, self.rest = [*lines, self.rest], b""
        return [line.decode(errors="replace").rstrip("\r") for line in lines]


def _result(module: str, exit_code: int, report: Path, log: Path, tail: list[str]) -> dict[str, Any]:
    """Return the report, or raise what it says went wrong: torchrun's exit code does not tell."""
    value = _read_report(report)
    if value is not None and "error" in value:
        error = value["error"]
        if error["exit_code"] == InputError.exit_code:
            raise InputError(error["message"])
        message = f"{module} failed with {error['type']}: {error['message']} (log: {log})"
        if error.get("verdict"):
            raise JobError(message)
        # torchrun's last words name the process that ended first, from which a rank's error may only follow
        raise JobCrashedError("\n".join([f"{message}; its last lines:", *tail]))
    if value is not None and value.get("stopped"):
        raise JobSavedError(f"{module} was told to stop and has saved; start it again to go on (log: {log})")
    if exit_code:
        ended = f"exit code {exit_code}" if exit_code > 0 else f"signal {signal.Signals(-exit_code).name}"
        raise JobCrashedError(f"{module} ended by {ended} (log: {log}); its last lines:\n" + "\n".join(tail))
    if value is None:
        raise JobCrashedError(f"{module} ended without a report at {report} (log: {log})")
    return value


def _read_report(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _stop(process: subprocess.Popen[bytes], job: str, grace: float) -> None:
    """Ask the agent to stop, give it `grace` seconds, then kill what still carries the job's mark."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    while left := marked(job):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        process.poll()
    process.wait()


def marked(job: str) -> list[int]:
    """List the processes that carry a job's mark, in whatever session and with whatever parent."""
    mark = f"{MARK}={job}".encode()
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if pid != os.getpid() and mark in _process_environment(pid)]


def _process_environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it ended meanwhile, or belongs to somebody else
        return []
