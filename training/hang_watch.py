"""Ends a job in which nothing moves any more, and names the rank that the others wait for.

Nothing here takes part in collectives, which hang in a hang. Each rank's watch is a thread that sees whether
its own rank moves, and publishes that in a file; ranks that are stopped, or whose main thread holds the
interpreter, are told by files that are no longer written.
"""

import ctypes
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
    asked_stack_file,
    guilty,
    heartbeat_file,
    publish,
    read_heartbeats,
    stacks_file,
)

HEARTBEATS = "heartbeats"
MARKER, ACCUSER = "hang", "accuser"
EXIT_CODE = 1
LONGEST_INTERVAL = 5.0  # seconds
MOMENT = 2.0  # seconds for what other ranks have to write
STACK_LINES = 60
STACK_SIGNAL = signal.SIGUSR2

_libc = ctypes.CDLL(None)


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
        self.asked_stack = asked_stack_file(self.folder, self.rank).open("w")
        faulthandler.register(STACK_SIGNAL, file=self.asked_stack, all_threads=False)
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
        faulthandler.unregister(STACK_SIGNAL)
        self.stacks.close()
        self.asked_stack.close()
        if error is None:
            for file in (heartbeat_file, stacks_file, asked_stack_file):
                file(self.folder, self.rank).unlink(missing_ok=True)
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
        first = min(beat.rank for beat in beats if self.is_alive(beat))
        if self.rank == first and self.is_only_accuser():
            blamed = guilty(beats, self.alive_after())
            if self.is_here(blamed) and not self.is_alive(blamed):
                self.ask_for_stack(blamed)
            self.accuse(blamed, idle)
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

    def is_only_accuser(self) -> bool:
        """Say whether no other rank accuses: one that was stopped may go on meanwhile."""
        try:
            (self.folder / ACCUSER).open("x").close()
        except FileExistsError:
            return False
        return True

    def is_here(self, beat: Heartbeat) -> bool:
        """Say whether a rank is a process of this node that the same agent started."""
        return beat.host == socket.gethostname() and beat.parent == os.getppid()

    def ask_for_stack(self, beat: Heartbeat) -> None:
        """Let a rank of this node that is stopped go on for the moment in which it writes where it is."""
        file = asked_stack_file(self.folder, beat.rank)
        # to its main thread, which answers before it does anything else
        if sys.platform == "linux" and _libc.tgkill(beat.pid, beat.pid, int(STACK_SIGNAL)) == 0:
            with suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGCONT)
                self.wait_until(lambda: file.stat().st_size > 0, MOMENT)
                os.kill(beat.pid, signal.SIGSTOP)

    def stack_of(self, beat: Heartbeat) -> str:
        """Return what a rank last wrote of where it is; nothing if it never could."""
        files = [file(self.folder, beat.rank) for file in (asked_stack_file, stacks_file)]
        found = [text for file in files if file.is_file() and (text := file.read_text())]
        return "\n".join(found[0].splitlines()[:STACK_LINES]) if found else ""

    def accuse(self, beat: Heartbeat, idle: float) -> None:
        """Write the report: who is to blame, where it is and its stack."""
        message = (
            f"rank {beat.rank} (process {beat.pid} on {beat.host}) {self.symptom(beat)}; rank {self.rank} has"
            f" not moved for {idle:.1f} s, and resilience.hang_timeout is {self.timeout:g}; stacks of all"
            f" ranks: {self.folder}"
        )
        error = {
            "type": "HangError",
            "message": f"{message}\n{self.stack_of(beat)}".rstrip(),
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
            if self.is_here(beat) and not self.is_alive(beat):
                with suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)
