"""Many processes: start N of each role, forward signals, restart the dead, leave none behind.

Every child holds the read end of a pipe as its standard input, whose other end is ours alone: should we be
killed, it reads the end of the pipe and drains (`parent.watch_parent`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from orderflow.engine.patience import Misconfigured, within
from orderflow.engine.telemetry import PROCESS, emit
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
METRICS_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"


def child_command(role: Role) -> list[str]:
    """The command line of a process with this one role; everything else comes with its environment."""
    return [sys.executable, "-m", "orderflow", "run", "--role", role]


async def run_processes(settings: Settings, counts: Mapping[Role, int], *, command: Command = child_command) -> int:
    """Run `counts` processes of each role until a signal or a spent crash budget ends them.

    A process that ends is started again; after a crash only while its budget lasts (`crash_budget` within
    `crash_window_seconds`). The first SIGTERM, SIGINT or SIGHUP reaches every child, as SIGTERM; `grace_seconds` and
    two more later it is SIGKILL. A second signal kills at once. Returns the exit code: 0, 1 for a spent budget or
    settings that a child refuses, 128 + the second signal's number. Raises Misconfigured when the HTTP port is taken.
    """
    slots = [_Slot(role, number) for role in ROLES for number in range(1, counts.get(role, 0) + 1)]
    if not slots:
        raise Misconfigured("nothing to run: give at least one of --api, --publisher, --worker a number above 0")
    with contextlib.ExitStack() as stack:
        port = settings.http_port
        if counts.get("api", 0):
            port = stack.enter_context(reserved_port(settings.http_host, port))
        metrics = tempfile.mkdtemp(prefix="orderflow-metrics-")
        stack.callback(shutil.rmtree, metrics, ignore_errors=True)
        inherited = child_environment(settings, port=port, metrics=metrics)
        return await _Processes(settings, slots, command, inherited, metrics).run()


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place for one process of a role; number 1 is the role's first."""

    role: Role
    number: int

    @property
    def name(self) -> str:
        return f"{self.role}-{self.number}"


def child_environment(settings: Settings, *, port: int, metrics: str) -> dict[str, str]:
    """Our own environment, and in it every setting: on a command line `ps` would show the passwords."""
    ours = {
        environment_name(name): _as_text(value)
        for name in Settings.model_fields
        if (value := getattr(settings, name)) is not None
    }
    ours |= {
        environment_name("http_port"): str(port),
        environment_name("http_reuse_port"): "true",
        environment_name("dev_children"): "true",
        METRICS_VARIABLE: metrics,
    }
    # Names of settings are read in any case: one in small letters must not stand beside ours.
    return {name: value for name, value in os.environ.items() if name.upper() not in ours} | ours


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def worker_name(base: str, number: int) -> str:
    """The id of the worker with this number: `payment-worker-3` for the third of `payment-worker-1`."""
    return f"{re.sub(r'-[0-9]+$', '', base)}-{number}"


@contextlib.contextmanager
def reserved_port(host: str, port: int) -> Iterator[int]:
    """Hold the port for our children; yields its number (a free one for 0).

    Raises Misconfigured when something else listens there, or the address is not ours to use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Without SO_REUSEPORT, with which we would share the port with whoever listens there already.
        with socket.socket(family, kind, protocol) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            found = int(alone.getsockname()[1])
        shared = socket.socket(family, kind, protocol)
    except OSError as error:
        raise Misconfigured(_port_error(host, port, error)) from error
    with shared:
        try:
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # It never listens, so it receives nothing; the port stays ours while no API process lives.
            shared.bind((address[0], found, *address[2:]))
        except OSError as error:
            raise Misconfigured(_port_error(host, found, error)) from error
        yield found


def _port_error(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} on {host} is taken: stop what listens there, or set HTTP_PORT to another"
        case errno.EACCES | errno.EPERM:
            return f"port {port} on {host} may not be used by this user: set HTTP_PORT to one above 1023"
        case _:
            reason = error.strerror or error
            return f"cannot listen on {host}:{port}: {reason}; check ORDERFLOW_HTTP_HOST and HTTP_PORT"


class _Processes:
    def __init__(
        self, settings: Settings, slots: Sequence[_Slot], command: Command, environment: dict[str, str], metrics: str
    ) -> None:
        self._settings = settings
        self._slots = slots
        self._command = command
        self._environment = environment
        self._metrics = metrics
        self._running: dict[_Slot, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._killing = asyncio.Event()
        self._code = OK

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        numbers = stop_signals()
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
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
            for number in numbers:
                loop.remove_signal_handler(number)
        return self._code

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stopping.is_set():
            self._stop(number.name)
        elif not self._killing.is_set():
            self._code = 128 + number
            self._killing.set()

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
        try:
            process = await self._start(slot, reading)
        except OSError as error:
            os.close(writing)
            emit(PROCESS, "PROCESS_CRASHED", process=slot.name, error=f"cannot be started: {error}")
            return FAILED
        finally:
            os.close(reading)
        self._running[slot] = process
        emit(PROCESS, "PROCESS_STARTED", process=slot.name, processId=process.pid)
        try:
            if self._stopping.is_set():
                _send(process, signal.SIGTERM)
            how = await process.wait()
        finally:
            del self._running[slot]
            os.close(writing)
        _forget_metrics(process.pid, self._metrics)
        expected = how == OK or self._stopping.is_set()
        ending = {"exitCode": how} if how >= 0 else {"signal": signal.Signals(-how).name}
        emit(
            PROCESS, "PROCESS_ENDED" if expected else "PROCESS_CRASHED", process=slot.name, processId=process.pid, **ending
        )  # fmt: skip
        return how

    async def _start(self, slot: _Slot, stdin: int) -> asyncio.subprocess.Process:
        environment = self._environment
        if slot.role == "worker":
            name = worker_name(self._settings.worker_id, slot.number)
            environment = environment | {environment_name("worker_id"): name}
        # A session of its own: Ctrl-C in a terminal is for us, and reaches the children as one SIGTERM from us.
        return await asyncio.create_subprocess_exec(
            *self._command(slot.role), stdin=stdin, env=environment, start_new_session=True
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
