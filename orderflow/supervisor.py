"""One process: its roles as tasks, each with its own restart loop, backoff and crash budget; signals; drain.

Not a TaskGroup: that would cancel the API because the relay crashed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Final, Protocol

from orderflow.engine.patience import Misconfigured, is_transient, within
from orderflow.engine.telemetry import PROCESS, emit
from orderflow.settings import masked

OK: Final = 0
FAILED: Final = 1
# EX_CONFIG of sysexits.h, and only from a child process to its parent: starting it again would change nothing.
MISCONFIGURED: Final = 78

CANCEL_SECONDS = 1.0
STEADY_SECONDS = 10.0
REMIND_SECONDS = 30.0
LAST_WORDS_SECONDS = 0.05


class Service(Protocol):
    """A role's task. Each restart calls `run` again on the same object: it has to build fresh state."""

    name: str

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set, then drain and return; to raise, or to return before, is a crash."""


class CrashBudget:
    """How many crashes within the last `window` seconds are answered by a restart."""

    def __init__(self, crashes: int, window: float) -> None:
        self._crashes = crashes
        self._window = window
        self._times: deque[float] = deque()

    def allows_restart(self, now: float) -> bool:
        """Count a crash at `now` (seconds, monotonic); False when the budget is spent."""
        self._times.append(now)
        while self._times[0] <= now - self._window:
            self._times.popleft()
        return len(self._times) <= self._crashes


def restart_delay(failures: int, *, base: float = 0.1, cap: float = 2.0) -> float:
    """Seconds to wait after that many failures in a row (>= 1): doubling up to `cap`, half of it jitter."""
    return min(cap, base * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)


def described(error: BaseException) -> str:
    """The error in one line of at most 500 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def told(error: BaseException) -> BaseException:
    """The error that decides what a group of errors means; any other error is returned as it is."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [told(leaf) for leaf in error.exceptions]
    wrong = [leaf for leaf in leaves if isinstance(leaf, Misconfigured)]
    lasting = [leaf for leaf in leaves if not is_transient(leaf)]
    return (wrong or lasting or leaves)[0]


def place_of(error: BaseException) -> str | None:
    """File, line and function where the error was raised."""
    trace = error.__traceback__
    if trace is None:
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_qualname}"


def report_failure(reason: str) -> None:
    """Say why the process ends, in the log and in one line on stderr."""
    emit(PROCESS, "FAILED", error=reason)
    # A closed stderr must not keep the other roles from draining.
    with contextlib.suppress(OSError, ValueError):
        print(f"orderflow: {masked(reason)}", file=sys.stderr, flush=True)


async def supervise(
    services: Sequence[Service], *, grace: float, crash_budget: int, crash_window: float,
    on_drain: Callable[[], None], child: bool = False,
) -> int:  # fmt: skip
    """Run the services until a signal, a spent crash budget or a wrong setting ends them.

    `grace`: seconds from the first SIGTERM, SIGINT or SIGHUP until what still runs is cancelled. `on_drain` is
    called before any service is told to stop. A second signal ends the process at once, with 128 + its number.
    `child`: a parent process decides that: a second signal is ignored, and a wrong setting is MISCONFIGURED.
    Returns the exit code: 0 after a signal, else 1. Ends the process from here when a service survives its
    cancellation for a second.
    """
    supervisor = _Supervisor(grace, lambda: CrashBudget(crash_budget, crash_window), on_drain, child)
    return await supervisor.run(services)


class _Supervisor:
    def __init__(self, grace: float, new_budget: Callable[[], CrashBudget], on_drain: Callable[[], None], child: bool) -> None:
        self._grace = grace
        self._new_budget = new_budget
        self._on_drain = on_drain
        self._child = child
        self._stopping = asyncio.Event()
        self._armed = False
        self._code = OK
        self._reasons: set[str] = set()

    async def run(self, services: Sequence[Service]) -> int:
        loop = asyncio.get_running_loop()
        outer_handler = loop.get_exception_handler()
        loop.set_exception_handler(_report_stray)
        tasks = {loop.create_task(self._keep_running(service), name=service.name) for service in services}
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            with self._signals(loop):
                await self._stopping.wait()
                await self._drain(tasks)
        finally:
            for task in tasks:
                task.cancel()
            loop.set_exception_handler(outer_handler)
        return self._code

    def _ended(self, task: asyncio.Task[None]) -> None:
        # A role that is gone without a word would leave a process that looks alive and does nothing.
        if not self._stopping.is_set():
            error = None if task.cancelled() else task.exception()
            self._fail(f"{task.get_name()} is gone: {described(error) if error else 'cancelled'}", FAILED)

    async def _keep_running(self, service: Service) -> None:
        loop = asyncio.get_running_loop()
        budget = self._new_budget()
        failures = 0
        waiting = _Waiting(service.name)
        while True:
            started = loop.time()
            error = await self._run_once(service)
            if error is None:
                return
            if isinstance(error, Misconfigured):
                # At once: what the others have in hand is as safe as after a crash.
                self._grace = min(self._grace, CANCEL_SECONDS)
                self._fail(str(error), MISCONFIGURED if self._child else FAILED)
                return
            failures = 1 if loop.time() - started > STEADY_SECONDS else failures + 1
            if is_transient(error):
                waiting.say(error)
            else:
                waiting.over()
                emit(PROCESS, "ROLE_CRASHED", role=service.name, error=described(error), at=place_of(error))
                if not self._stopping.is_set() and not budget.allows_restart(loop.time()):
                    self._fail(f"{service.name} crashed too often; the last error: {described(error)}", FAILED)
                    return
            if await self._stopped_within(restart_delay(failures)):
                return
            if not waiting.said:
                emit(PROCESS, "ROLE_RESTARTED", role=service.name, crashes=failures)

    async def _run_once(self, service: Service) -> BaseException | None:
        """None when the service has drained as told, else what ended it."""
        try:
            await service.run(self._stopping)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # Without a request of ours, a library has let its own cancellation escape: a crash like any other.
            if task is None or task.cancelling():
                raise
            return RuntimeError("was cancelled from inside")
        except Exception as error:
            return told(error)
        return None if self._stopping.is_set() else RuntimeError("returned without being told to stop")

    async def _stopped_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await within(self._stopping.wait(), seconds)
        return self._stopping.is_set()

    def _fail(self, reason: str, code: int) -> None:
        self._code = self._code or code
        # One wrong setting stops every role: people read its line once.
        if reason not in self._reasons:
            self._reasons.add(reason)
            report_failure(reason)
        self._stop(reason="failure")

    def _stop(self, reason: str) -> None:
        if self._stopping.is_set():
            return
        try:
            self._on_drain()
        finally:
            emit(PROCESS, "DRAINING", reason=reason, graceSeconds=self._grace)
            self._stopping.set()

    async def _drain(self, tasks: set[asyncio.Task[None]]) -> None:
        left = (await asyncio.wait(tasks, timeout=self._grace))[1] if tasks else set()
        if left:
            emit(PROCESS, "DRAIN_INCOMPLETE", roles=_names(left), graceSeconds=self._grace)
            for task in left:
                task.cancel()
            left = (await asyncio.wait(left, timeout=CANCEL_SECONDS))[1]
        emit(PROCESS, "STOPPED", exitCode=self._code, **({"hanging": _names(left)} if left else {}))
        if left:
            # aiokafka's stop can hang (#773), and asyncio.run would wait for it without an end.
            await asyncio.sleep(LAST_WORDS_SECONDS)
            os._exit(self._code)

    @contextlib.contextmanager
    def _signals(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in stop_signals()}
        for number in before:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                # After a signal the process is about to end, and the second one keeps its meaning until it has.
                signal.signal(number, self._second if self._armed else handler)

    def _on_signal(self, number: int) -> None:
        self._armed = True
        for other in stop_signals():
            # Not by a call of the event loop: a second Ctrl-C has to work while the loop is blocked. The loop's own
            # handlers stay: with the last of them its wake-up descriptor would go, and a signal that comes just
            # before the loop sleeps would be seen when something else wakes it.
            signal.signal(other, self._second)
        self._stop(reason=signal.Signals(number).name)

    @property
    def _second(self) -> signal.Handlers | Callable[[int, FrameType | None], None]:
        # A child gets the same signal from its service manager and from its parent, and the parent kills what
        # takes too long.
        return signal.SIG_IGN if self._child else _end_at_once


def _names(tasks: set[asyncio.Task[None]]) -> list[str]:
    return sorted(task.get_name() for task in tasks)


class _Waiting:
    """Says what a role waits for: each new reason at once, an old one every REMIND_SECONDS."""

    def __init__(self, role: str) -> None:
        self._role = role
        self.said = ""
        self._at = 0.0

    def say(self, error: BaseException) -> None:
        reason = described(error) if not str(error) else str(error)[:500]
        now = time.monotonic()
        if reason != self.said or now - self._at >= REMIND_SECONDS:
            self.said, self._at = reason, now
            emit(PROCESS, "ROLE_WAITING", role=self._role, reason=reason)

    def over(self) -> None:
        self.said = ""


def stop_signals() -> list[signal.Signals]:
    """The signals that mean "drain": SIGHUP is not among them under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    # The log's writer thread gets a moment for the lines it holds; taking its lock here could be a deadlock.
    time.sleep(LAST_WORDS_SECONDS)
    os._exit(128 + number)


def _report_stray(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Tell of an error that no task of ours has waited for."""
    error = context.get("exception")
    detail = {"error": described(error), "at": place_of(error)} if isinstance(error, BaseException) else {}
    emit(PROCESS, "TASK_CRASHED", message=str(context.get("message", ""))[:500], **detail)
