"""The program under test: processes of `orderflow run`, and one log of all the lines that they write."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import orjson

from orderflow.commands.walkthrough import Missed
from orderflow.engine.patience import within

T = TypeVar("T")
Line = dict[str, Any]

# Seconds. Generous: what is checked is that a thing happens, and a busy machine is no miss.
DEADLINE = 30.0
STOP_TIMEOUT = 20.0
POLL = 0.02
TAIL = 20


class Log:
    """Every JSON line that the programs have written, in the order of arrival."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._arrived = asyncio.Condition()
        self._ended: str | None = None

    async def add(self, line: Line) -> None:
        """Take a line in, and tell those who wait."""
        async with self._arrived:
            self.lines.append(line)
            self._arrived.notify_all()

    async def end(self, reason: str) -> None:
        """A program is gone that should not be: who waits for its lines waits no longer."""
        async with self._arrived:
            self._ended = reason
            self._arrived.notify_all()

    def count(self, kind: str) -> int:
        """How many lines of a type there are."""
        return sum(line.get("type") == kind for line in self.lines)

    async def line(self, service: str, kind: str, *, after: int = 0, timeout: float = DEADLINE, **fields: object) -> Line:
        """The first line of that service and type with these fields, from index `after` on, waited for if need be.

        Raises Missed after `timeout` seconds, or when a program has ended.
        """
        wanted = {"service": service, "type": kind, **fields}
        position = after

        def found() -> Line | None:
            nonlocal position
            while position < len(self.lines):
                line = self.lines[position]
                position += 1
                if wanted.items() <= line.items():
                    return line
            return None

        async with self._arrived:
            try:
                async with asyncio.timeout(timeout):
                    while (line := found()) is None:
                        if self._ended is not None:
                            raise Missed(self._ended)
                        await self._arrived.wait()
            except TimeoutError:
                named = ", ".join(f"{name} {value}" for name, value in fields.items())
                raise Missed(f"no {kind} of {service} within {timeout:.0f} s ({named})") from None
            return line


class Program:
    """One process of `orderflow run`, whose lines go to the log."""

    def __init__(self, log: Log, environment: Mapping[str, str], *arguments: str, directory: Path | None = None) -> None:
        self._log = log
        self._directory = directory
        self._environment = dict(environment)
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._errors: deque[str] = deque(maxlen=TAIL)
        self._expected_to_end = False

    async def start(self) -> None:
        """Start it; `stop` or `kill` before starting it again."""
        self._expected_to_end = False
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "orderflow", "run", *self._arguments,
            # Held open as long as we live: its end is how the program learns of ours, however we end.
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=self._environment, cwd=self._directory, limit=2**20,
        )  # fmt: skip
        self._readers = [asyncio.create_task(self._read_lines()), asyncio.create_task(self._read_errors())]

    async def _read_lines(self) -> None:
        process = self._running()
        assert process.stdout is not None
        async for raw in process.stdout:
            # Not every line has to be ours: what is not JSON is kept for the report of a failure.
            try:
                line = orjson.loads(raw)
            except orjson.JSONDecodeError:
                self._errors.append(raw.decode(errors="replace").rstrip())
                continue
            if isinstance(line, dict):
                await self._log.add(line)
        code = await process.wait()
        if not self._expected_to_end:
            await asyncio.wait(self._readers[1:], timeout=1.0)
            said = " | ".join(self._errors) or "it said nothing"
            await self._log.end(f"`orderflow run {' '.join(self._arguments)}` ended with {code}: {said}")

    async def _read_errors(self) -> None:
        process = self._running()
        assert process.stderr is not None
        async for raw in process.stderr:
            self._errors.append(raw.decode(errors="replace").rstrip())

    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "start() comes first"
        return self._process

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int | None:
        """SIGTERM, SIGKILL where that does not end it in time; its exit code, None when it had not been started."""
        if self._process is None:
            return None
        await self._end(signal.SIGTERM)
        return self._process.returncode

    async def _end(self, number: signal.Signals) -> None:
        process = self._running()
        self._expected_to_end = True
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            await within(process.wait(), STOP_TIMEOUT)
        except TimeoutError:
            process.kill()
            await process.wait()
        await asyncio.wait(self._readers, timeout=STOP_TIMEOUT)
        if process.stdin is not None:
            process.stdin.close()


async def until(ask: Callable[[], Awaitable[T]], holds: Callable[[T], bool], what: str, *, timeout: float = DEADLINE) -> T:
    """Ask the database until the answer holds, and return that. Raises Missed, with the last answer, when it is too late."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    while True:
        answer = await ask()
        if holds(answer):
            return answer
        if loop.time() > end:
            raise Missed(f"not within {timeout:.0f} s: {what}; last seen: {answer}")
        await asyncio.sleep(POLL)
