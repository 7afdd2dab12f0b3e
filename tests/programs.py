"""Small Python programs as real processes: started, signalled, and waited for by their lines of output and their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 20.0

# What every program begins with: each fact becomes a line of JSON at once.
FACTS = """
import asyncio, json, os, signal, sys, time
from orderflow.engine import telemetry

def tell(type, **fields):
    os.write(1, (json.dumps({"type": type, "pid": os.getpid(), **fields}, default=str) + "\\n").encode())

def subscribe():
    telemetry.subscribe(lambda service, event, facts: [tell(event, **fields) for fields in facts])
"""


class Program:
    """A running program; a context manager that leaves no process behind."""

    def __init__(
        self, source: str, *arguments: str, environment: Mapping[str, str] | None = None, stdin: int | None = None
    ) -> None:
        self.process = subprocess.Popen(
            (sys.executable, "-c", FACTS + textwrap.dedent(source), *arguments),
            cwd=ROOT, stdin=stdin or subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self.pid = self.process.pid
        self.seen: list[dict[str, Any]] = []
        self._lines: Queue[bytes] = Queue()
        self._errors: list[bytes] = []
        self._readers = [Thread(target=self._read, daemon=True), Thread(target=self._read_errors, daemon=True)]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(TIMEOUT)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors.append(line)

    def until(self, wanted: str, timeout: float = TIMEOUT, **fields: object) -> dict[str, Any]:
        """The next line of that type with these fields; fails when it does not come in time."""
        end = time.monotonic() + timeout
        while True:
            try:
                line = json.loads(self._lines.get(timeout=max(0.0, end - time.monotonic())))
            except Empty:
                raise AssertionError(f"no {wanted} {fields}; seen: {self.seen}; stderr: {self.errors}") from None
            self.seen.append(line)
            if line["type"] == wanted and fields.items() <= line.items():
                return line

    def send(self, number: int) -> None:
        """Send a signal to the program."""
        self.process.send_signal(number)

    def end(self, timeout: float = TIMEOUT) -> int:
        """Wait for the program's end; its exit code, and all its lines are in `seen`."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running; seen: {self.seen}; stderr: {self.errors}") from None
        for reader in self._readers:
            reader.join(TIMEOUT)
        while not self._lines.empty():
            self.seen.append(json.loads(self._lines.get()))
        return code

    @property
    def errors(self) -> str:
        """What has come on stderr so far."""
        return b"".join(self._errors).decode()

    def types(self) -> list[str]:
        """The types of the lines seen so far."""
        return [line["type"] for line in self.seen]


def holds(condition: Callable[[], bool], timeout: float = TIMEOUT) -> bool:
    """Whether the condition comes true in time; for what gives no signal, such as the end of another's child."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Whether a process of that id runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def end_all(pids: list[int]) -> None:
    """Kill what is left of processes whose ids a program has told."""
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
