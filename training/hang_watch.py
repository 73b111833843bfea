"""Ends a job in which nothing moves any more, and names the rank that the others wait for.

Nothing here takes part in collectives, which hang in a hang. Each rank's watch is a thread that sees whether
its own rank moves, and publishes that in a file; ranks that are stopped, or whose main thread holds the
interpreter, are told by files that are no longer written.
"""

import faulthandler
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch

from bridge.job import write_json
from training.heartbeat import (
    Heart,
    Heartbeat,
    guilty,
    heartbeat_file,
    publish,
    read_heartbeats,
    stacks_file,
)

HEARTBEATS = "heartbeats"
MARKER = "hang"
EXIT_CODE = 1
LONGEST_INTERVAL = 5.0  # seconds
MOMENT = 2.0  # seconds for what other ranks have to write
STACK_LINES = 60


class HangWatch:
    """Watches this rank while its body runs; the process ends hard, as a crash, when a hang is certain.

    `report` is the job's report, which then gets the error; beside it, in a folder "heartbeats", every rank
    leaves its stacks. `timeout` is in seconds. All ranks enter together.
    """

    def __init__(self, heart: Heart, timeout: float, report: Path) -> None:
        self.heart, self.timeout, self.report = heart, timeout, report
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.folder = report.parent / HEARTBEATS
        self.interval = min(timeout / 20, LONGEST_INTERVAL)
        self.has_fired, self.has_ended = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.watch, name="hang watch", daemon=True)

    def __enter__(self) -> "HangWatch":
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        torch.distributed.barrier()
        self.stacks = stacks_file(self.folder, self.rank).open("w")
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.has_fired.is_set():
            # lost connections and the like follow from the hang: they must not hide it in the report
            threading.Event().wait()
        self.has_ended.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.stacks.close()
        if error is None:
            heartbeat_file(self.folder, self.rank).unlink(missing_ok=True)
            stacks_file(self.folder, self.rank).unlink(missing_ok=True)
            with suppress(OSError):  # other ranks' files are still there
                self.folder.rmdir()

    def watch(self) -> None:
        """Publish and look, a few times in a timeout."""
        beats, idle, looked = self.heart.beats, 0.0, time.monotonic()
        while True:
            publish(self.folder, self.rank, self.heart, hangs=False)
            # needs no interpreter: it writes stacks also where the main thread never gives it up
            faulthandler.dump_traceback_later(0.9 * self.timeout, file=self.stacks)
            if self.has_ended.wait(self.interval):
                return
            now = time.monotonic()
            # a process that was stopped and goes on has not been idle
            passed, looked = min(now - looked, 2 * self.interval), now
            idle = idle + passed if self.heart.beats == beats else 0.0
            beats = self.heart.beats
            if (self.folder / MARKER).exists() or (idle > self.timeout and self.is_hang()):
                self.end(idle)

    def is_hang(self) -> bool:
        """Say whether no rank is at something that may take long."""
        others = read_heartbeats(self.folder, self.ranks)
        return self.heart.limited and all(beat.limited for beat in others if self.is_alive(beat))

    def is_alive(self, beat: Heartbeat) -> bool:
        return beat.published > self.alive_after()

    def alive_after(self) -> float:
        return time.time() - max(self.timeout / 2, 3 * self.interval)

    def end(self, idle: float) -> None:
        """Write down what this rank is at, report if it is the one to do so, and end the process."""
        self.has_fired.set()
        (self.folder / MARKER).touch()
        faulthandler.cancel_dump_traceback_later()
        place = f"{self.heart.phase} of iteration {self.heart.iteration}"
        print(f"rank {self.rank} has not moved for {idle:.1f} s in {place}:", file=sys.stderr, flush=True)
        self.write_stacks(self.stacks)
        faulthandler.dump_traceback(file=sys.stderr)
        publish(self.folder, self.rank, self.heart, hangs=True)
        self.wait_for_stacks()
        beats = read_heartbeats(self.folder, self.ranks)
        if self.rank == min(beat.rank for beat in beats if self.is_alive(beat)):
            self.accuse(guilty(beats, self.alive_after()), idle)
            time.sleep(self.interval)
            self.kill_the_dead(beats)
        else:
            self.wait_until(self.report.is_file, self.interval + MOMENT)
        os._exit(EXIT_CODE)

    def write_stacks(self, file: TextIO) -> None:
        """Write the stack of the main thread, then those of all threads."""
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        file.write("main thread (most recent call last):\n" + "".join(traceback.format_stack(frame)) + "\n")
        file.flush()
        faulthandler.dump_traceback(file=file)
        file.flush()

    def wait_for_stacks(self) -> None:
        """Give every rank that lives the time to write its own."""

        def all_written() -> bool:
            beats = read_heartbeats(self.folder, self.ranks)
            return all(beat.hangs for beat in beats if self.is_alive(beat))

        self.wait_until(all_written, 2 * self.interval + MOMENT)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(min(self.interval, 0.05))

    def accuse(self, beat: Heartbeat, idle: float) -> None:
        """Write the report: who is to blame, where it is and its stack."""
        file = stacks_file(self.folder, beat.rank)
        stack = "\n".join(file.read_text().splitlines()[:STACK_LINES]) if file.is_file() else ""
        message = (
            f"rank {beat.rank} (process {beat.pid} on {beat.host}) {self.symptom(beat)}; rank {self.rank} has"
            f" not moved for {idle:.1f} s, and resilience.hang_timeout is {self.timeout:g}; stacks of all"
            f" ranks: {self.folder}"
        )
        error = {
            "type": "HangError",
            "message": f"{message}\n{stack}".rstrip(),
            "exit_code": EXIT_CODE,
            "verdict": False,
            "rank": beat.rank,
            "iteration": beat.iteration,
            "phase": beat.phase,
        }
        write_json(self.report, {"error": error})
        print(f"error: {message}", file=sys.stderr, flush=True)

    def symptom(self, beat: Heartbeat) -> str:
        if self.is_alive(beat):
            return f"hangs in {beat.place}, for {time.time() - beat.since:.1f} s"
        return (
            f"has given no sign of life for {time.time() - beat.published:.1f} s: it is stopped, or its host"
            f" is gone; it was last seen in {beat.place}"
        )

    def kill_the_dead(self, beats: list[Heartbeat]) -> None:
        """End ranks of this node that cannot end themselves, for which torchrun would wait half a minute."""
        for beat in beats:
            here = beat.host == socket.gethostname() and beat.parent == os.getppid()
            if here and not self.is_alive(beat):
                with suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)
