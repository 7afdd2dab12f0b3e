"""Many processes: start N of each role, forward signals, restart the dead, leave none behind.

Every child holds the read end of a pipe as its standard input, whose other end is ours alone: should we be
killed, it reads the end of the pipe and drains (`parent.watch_parent`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from orderflow.children import child_command, child_environment, worker_name
from orderflow.engine.patience import Misconfigured, within
from orderflow.engine.telemetry import PROCESS, emit
from orderflow.held_port import held_port
from orderflow.settings import ROLES, Role, Settings, environment_name
from orderflow.supervisor import (
    FAILED,
    MISCONFIGURED,
    OK,
    STEADY_SECONDS,
    CrashBudget,
    described,
    report_failure,
    restart_delay,
    stop_signals,
)

Command = Callable[[Role], Sequence[str]]

KILL_MARGIN_SECONDS: Final = 2.0
REAP_SECONDS: Final = 5.0
# For a process that takes another's place to come up.
START_SECONDS: Final = 30.0


async def run_processes(settings: Settings, counts: Mapping[Role, int], *, command: Command = child_command) -> int:
    """Run `counts` processes of each role until a signal or a spent crash budget ends them.

    A process that ends is started again; after a crash only while its budget lasts (`crash_budget` within
    `crash_window_seconds`). The first SIGTERM, SIGINT or SIGHUP reaches every child, as SIGTERM; `grace_seconds` and
    two more later it is SIGKILL. A second signal kills at once. SIGUSR1 replaces every process, one after the other (a
    rolling restart). Returns the exit code: 0, 1 for a spent budget or settings that a child refuses, 128 + the second
    signal's number. Raises Misconfigured when the HTTP port is taken.
    """
    slots = [_Slot(role, number) for role in ROLES for number in range(1, counts.get(role, 0) + 1)]
    if not slots:
        raise Misconfigured("nothing to run: give at least one of --api, --publisher, --worker a number above 0")
    with contextlib.ExitStack() as stack:
        port = settings.http_port
        sockets: Sequence[socket.socket] = ()
        if counts.get("api", 0):
            port, sockets = stack.enter_context(held_port(settings.http_host, port))
        metrics = tempfile.mkdtemp(prefix="orderflow-metrics-")
        stack.callback(shutil.rmtree, metrics, ignore_errors=True)
        inherited = child_environment(settings, port=port, metrics=metrics, sockets=sockets)
        return await _Processes(settings, slots, command, inherited, metrics, sockets).run()


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place for one process of a role; number 1 is the role's first."""

    role: Role
    number: int

    @property
    def name(self) -> str:
        return f"{self.role}-{self.number}"


class _Processes:
    def __init__(
        self, settings: Settings, slots: Sequence[_Slot], command: Command, environment: dict[str, str], metrics: str,
        sockets: Sequence[socket.socket],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._slots = slots
        self._command = command
        self._environment = environment
        self._metrics = metrics
        self._sockets = sockets
        self._running: dict[_Slot, asyncio.subprocess.Process] = {}
        # Set while the slot's process has come up.
        self._up = {slot: asyncio.Event() for slot in slots}
        self._rolling: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._killing = asyncio.Event()
        self._code = OK

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        numbers = stop_signals()
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGUSR1, self._on_roll)
        tasks = [loop.create_task(self._keep_running(slot), name=slot.name) for slot in self._slots]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            await self._stopping.wait()
            await self._drain(tasks)
        finally:
            self._signal_all(signal.SIGKILL)
            for task in tasks:
                task.cancel()
            if self._rolling is not None:
                self._rolling.cancel()
            for number in (*numbers, signal.SIGUSR1):
                loop.remove_signal_handler(number)
        return self._code

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stopping.is_set():
            self._stop(number.name)
        elif not self._killing.is_set():
            self._code = 128 + number
            self._killing.set()

    def _on_roll(self) -> None:
        if not self._stopping.is_set() and (self._rolling is None or self._rolling.done()):
            self._rolling = asyncio.get_running_loop().create_task(self._roll(), name="rolling restart")

    async def _roll(self) -> None:
        """End each process and wait until another is up in its place; the first that does not come up ends the roll."""
        for slot in self._slots:
            up = self._up[slot]
            try:
                await within(up.wait(), START_SECONDS)
                up.clear()
                if (process := self._running.get(slot)) is not None:
                    _send(process, signal.SIGTERM)
                await within(up.wait(), self._settings.grace_seconds + KILL_MARGIN_SECONDS + START_SECONDS)
            except TimeoutError:
                emit(PROCESS, "ROLLING_RESTART_STOPPED", process=slot.name)
                return
        emit(PROCESS, "ROLLING_RESTART_DONE", processes=len(self._slots))

    def _stop(self, reason: str) -> None:
        if not self._stopping.is_set():
            emit(PROCESS, "DRAINING", reason=reason, graceSeconds=self._settings.grace_seconds)
            self._stopping.set()
            self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self._running.values():
            _send(process, number)

    async def _drain(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        killing = asyncio.create_task(self._killing.wait())
        drained: asyncio.Future[Any] = asyncio.gather(*tasks, return_exceptions=True)
        ends: set[asyncio.Future[Any]] = {killing, drained}
        await asyncio.wait(
            ends, timeout=self._settings.grace_seconds + KILL_MARGIN_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )  # fmt: skip
        killing.cancel()
        if not drained.done():
            emit(PROCESS, "DRAIN_INCOMPLETE", processes=sorted(slot.name for slot in self._running))
            self._signal_all(signal.SIGKILL)
            await asyncio.wait({drained}, timeout=REAP_SECONDS)
        emit(PROCESS, "STOPPED", exitCode=self._code)

    async def _keep_running(self, slot: _Slot) -> None:
        loop = asyncio.get_running_loop()
        budget = CrashBudget(self._settings.crash_budget, self._settings.crash_window_seconds)
        failures = 0
        while not self._stopping.is_set():
            started = loop.time()
            how = await self._run_once(slot)
            if self._stopping.is_set():
                return
            if how == MISCONFIGURED:
                # It has told people which setting, in the one line that they are to read.
                self._code = FAILED
                emit(PROCESS, "FAILED", error=f"{slot.name} cannot work with these settings")
                self._stop("failure")
                return
            failures = 1 if loop.time() - started > STEADY_SECONDS else failures + 1
            # An end with 0 is one that somebody asked for: not a crash, but started again all the same.
            if how != OK and not budget.allows_restart(loop.time()):
                self._fail(f"{slot.name} crashed too often")
                return
            with contextlib.suppress(TimeoutError):
                await within(self._stopping.wait(), restart_delay(failures))

    async def _run_once(self, slot: _Slot) -> int:
        """Start the slot's process and wait for its end; returns its exit code, negative for a signal."""
        reading, writing = os.pipe()
        hearing, telling = os.pipe()
        try:
            process = await self._start(slot, reading, telling)
        except OSError as error:
            os.close(writing)
            os.close(hearing)
            emit(PROCESS, "PROCESS_CRASHED", process=slot.name, error=f"cannot be started: {error}")
            return FAILED
        finally:
            os.close(reading)
            os.close(telling)
        self._running[slot] = process
        emit(PROCESS, "PROCESS_STARTED", process=slot.name, processId=process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(hearing, self._hear, slot, hearing)
        try:
            if self._stopping.is_set():
                _send(process, signal.SIGTERM)
            how = await process.wait()
        finally:
            loop.remove_reader(hearing)
            self._up[slot].clear()
            del self._running[slot]
            os.close(writing)
            os.close(hearing)
        _forget_metrics(process.pid, self._metrics)
        expected = how == OK or self._stopping.is_set()
        ending = {"exitCode": how} if how >= 0 else {"signal": signal.Signals(-how).name}
        emit(
            PROCESS, "PROCESS_ENDED" if expected else "PROCESS_CRASHED", process=slot.name, processId=process.pid, **ending
        )  # fmt: skip
        return how

    def _hear(self, slot: _Slot, descriptor: int) -> None:
        # At the end of the pipe nothing is read: it has ended before it was up.
        if os.read(descriptor, 1):
            self._up[slot].set()
        asyncio.get_running_loop().remove_reader(descriptor)

    async def _start(self, slot: _Slot, stdin: int, telling: int) -> asyncio.subprocess.Process:
        environment = self._environment | {environment_name("ready_descriptor"): str(telling)}
        if slot.role == "worker":
            name = worker_name(self._settings.worker_id, slot.number)
            environment = environment | {environment_name("worker_id"): name}
        # A session of its own: Ctrl-C in a terminal is for us, and reaches the children as one SIGTERM from us.
        sockets = [one.fileno() for one in self._sockets] if slot.role == "api" else []
        return await asyncio.create_subprocess_exec(
            *self._command(slot.role), stdin=stdin, env=environment, start_new_session=True, pass_fds=(telling, *sockets)
        )

    def _ended(self, task: asyncio.Task[None]) -> None:
        # A slot that nobody watches any more would stay empty without a word.
        if not self._stopping.is_set():
            error = None if task.cancelled() else task.exception()
            self._fail(f"{task.get_name()} is no longer watched: {described(error) if error else 'cancelled'}")

    def _fail(self, reason: str) -> None:
        self._code = self._code or FAILED
        report_failure(reason)
        self._stop("failure")


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _forget_metrics(process_id: int, directory: str) -> None:
    """Its counts stay, since a counter must not go back; what it was at its end (gauges of the living) goes."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(process_id, directory)  # type: ignore[no-untyped-call]
