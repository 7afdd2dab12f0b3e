"""One process: crashes, backoff, budgets, and real signals to real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow import supervisor
from orderflow.engine import telemetry
from orderflow.engine.patience import DependencyUnavailable, Misconfigured
from orderflow.supervisor import CrashBudget, described, restart_delay, supervise, told
from tests.programs import Program

LIMIT = 10.0
LOOPS = ("asyncio", "uvloop")
on_both_loops = pytest.mark.parametrize("loop", LOOPS)

Run = Callable[[asyncio.Event], Any]


class Role:
    """A service whose successive runs are given; the last one is repeated."""

    def __init__(self, name: str, *runs: Run) -> None:
        self.name = name
        self.runs = 0
        self._runs = runs

    async def run(self, stopping: asyncio.Event) -> None:
        step = self._runs[min(self.runs, len(self._runs) - 1)]
        self.runs += 1
        await step(stopping)


async def work(stopping: asyncio.Event) -> None:
    await stopping.wait()


def crash(error: BaseException) -> Run:
    async def run(_stopping: asyncio.Event) -> None:
        raise error

    return run


@pytest.fixture
def facts() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    seen: list[tuple[str, dict[str, Any]]] = []
    with telemetry.subscribed(lambda _service, event, facts: seen.extend((event, fields) for fields in facts)):
        yield seen


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "restart_delay", lambda failures: 0.001)


async def supervised(*roles: Role, grace: float = LIMIT, budget: int = 3, window: float = 60.0) -> int:
    return await asyncio.wait_for(
        supervise(roles, grace=grace, crash_budget=budget, crash_window=window, on_drain=lambda: None), LIMIT * 2
    )


def terminate_soon() -> Run:
    async def run(stopping: asyncio.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await stopping.wait()

    return run


@pytest.fixture
def handlers_kept() -> Iterator[None]:
    """After a signal the process is about to end, and supervise leaves its handlers: not here."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("quick", "handlers_kept")
async def test_a_crash_restarts_its_own_role_only(facts: list[tuple[str, dict[str, Any]]]) -> None:
    steady = Role("api", work)
    crashing = Role("worker", crash(ValueError("boom")), crash(ValueError("boom")), terminate_soon())
    assert await supervised(steady, crashing) == 0
    assert (steady.runs, crashing.runs) == (1, 3)
    assert [event for event, _ in facts] == [
        "ROLE_CRASHED", "ROLE_RESTARTED", "ROLE_CRASHED", "ROLE_RESTARTED", "DRAINING", "STOPPED",
    ]  # fmt: skip
    assert facts[0][1]["role"] == "worker"
    assert facts[0][1]["error"] == "ValueError: boom"
    assert facts[0][1]["at"].startswith("test_supervisor.py:")
    assert facts[4][1]["reason"] == "SIGTERM"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("budget", [0, 1, 3])
async def test_a_spent_budget_drains_the_rest_and_fails(budget: int, capsys: pytest.CaptureFixture[str]) -> None:
    drained = []

    async def drains(stopping: asyncio.Event) -> None:
        await stopping.wait()
        drained.append(True)

    crashing = Role("publisher", crash(ValueError("boom\nboom")))
    assert await supervised(Role("api", drains), crashing, budget=budget) == 1
    assert crashing.runs == budget + 1
    assert drained == [True]
    assert capsys.readouterr().err == "orderflow: publisher crashed too often; the last error: ValueError: boom boom\n"


@pytest.mark.usefixtures("quick", "handlers_kept")
@pytest.mark.parametrize("error", [DependencyUnavailable("no PostgreSQL"), TimeoutError(), ConnectionResetError("gone")])
async def test_what_passes_costs_no_budget(error: Exception, facts: list[tuple[str, dict[str, Any]]]) -> None:
    waiting = Role("worker", *[crash(error)] * 8, terminate_soon())
    assert await supervised(waiting, budget=0) == 0
    assert waiting.runs == 9
    # The same reason is said once, not at each try.
    assert [event for event, _ in facts] == ["ROLE_WAITING", "DRAINING", "STOPPED"]
    assert facts[0][1] == {"role": "worker", "reason": str(error) or "TimeoutError"}


@pytest.mark.usefixtures("handlers_kept")
async def test_a_server_that_is_away_while_it_drains_is_no_crash(facts: list[tuple[str, dict[str, Any]]]) -> None:
    async def run(stopping: asyncio.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await stopping.wait()
        raise DependencyUnavailable("no Kafka")

    assert await supervised(Role("worker", run)) == 0
    assert [event for event, _ in facts] == ["DRAINING", "ROLE_WAITING", "STOPPED"]


async def test_a_wrong_setting_ends_the_process_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    async def deaf(_stopping: asyncio.Event) -> None:
        await asyncio.Event().wait()

    wrong = Role("worker", crash(Misconfigured("no database 'x': create it")))
    began = time.monotonic()
    assert await supervised(Role("api", deaf), wrong, grace=60.0) == 1
    assert wrong.runs == 1
    assert time.monotonic() - began < LIMIT
    assert capsys.readouterr().err == "orderflow: no database 'x': create it\n"


@pytest.mark.parametrize(
    "ending",
    [crash(asyncio.CancelledError()), lambda _stopping: asyncio.sleep(0)],
    ids=["cancelled by a library", "returned unasked"],
)
async def test_an_end_that_nobody_asked_for_is_a_crash(ending: Run, facts: list[tuple[str, dict[str, Any]]]) -> None:
    assert await supervised(Role("worker", ending), budget=0) == 1
    assert facts[0][0] == "ROLE_CRASHED"


@pytest.mark.usefixtures("handlers_kept")
async def test_readiness_goes_before_anyone_stops() -> None:
    order = []

    async def role(stopping: asyncio.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await stopping.wait()
        order.append("stopped")

    def on_drain() -> None:
        order.append("draining")

    code = supervise([Role("api", role)], grace=LIMIT, crash_budget=0, crash_window=1.0, on_drain=on_drain)
    assert await asyncio.wait_for(code, LIMIT) == 0
    assert order == ["draining", "stopped"]


async def test_an_error_of_a_stray_task_is_told(facts: list[tuple[str, dict[str, Any]]]) -> None:
    async def stray() -> None:
        raise ValueError("nobody waits for me")

    async def role(_stopping: asyncio.Event) -> None:
        task = asyncio.create_task(stray())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task
        raise Misconfigured("enough")

    assert await supervised(Role("worker", role)) == 1
    event, fields = facts[0]
    assert event == "TASK_CRASHED"
    assert fields["error"] == "ValueError: nobody waits for me"


async def test_cancelling_the_supervisor_cancels_its_roles() -> None:
    ended = asyncio.Event()
    begun = asyncio.Event()

    async def role(stopping: asyncio.Event) -> None:
        begun.set()
        try:
            await stopping.wait()
        finally:
            ended.set()

    task = asyncio.create_task(supervised(Role("api", role)))
    before = signal.getsignal(signal.SIGTERM)
    await asyncio.wait_for(begun.wait(), LIMIT)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await asyncio.wait_for(ended.wait(), LIMIT)
    assert signal.getsignal(signal.SIGTERM) is before


SCRIPT = """
from orderflow.supervisor import supervise
subscribe()

class Service:
    def __init__(self, name, drain):
        self.name, self.drain = name, drain
    async def run(self, stopping):
        tell("UP", role=self.name)
        await stopping.wait()
        await self.drain()
        tell("DOWN", role=self.name)

async def at_once(): pass
async def never():
    await asyncio.Event().wait()
async def asked():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    tell("ASKED", wakes=before != -1)
async def deaf():
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            tell("DEAF")
async def blocking():
    tell("BLOCKING")
    while True:
        time.sleep(0.01)

async def main(names, grace, child):
    services = [Service(name, globals()[name]) for name in names]
    code = await supervise(services, grace=grace, crash_budget=0, crash_window=1.0,
                           on_drain=lambda: tell("UNREADY"), child=child)
    tell("RETURNED", code=code)
    return code

if sys.argv[1] == "uvloop":
    import uvloop
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
else:
    runner = asyncio.Runner()
with runner:
    code = runner.run(main(sys.argv[3].split(","), float(sys.argv[2]), sys.argv[4:] == ["child"]))
sys.exit(code)
"""


@on_both_loops
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_and_exits_with_0(loop: str, number: signal.Signals) -> None:
    with Program(SCRIPT, loop, "20", "at_once") as program:
        program.until("UP")
        program.send(number)
        assert program.end() == 0
        assert program.types() == ["UP", "UNREADY", "DRAINING", "DOWN", "STOPPED", "RETURNED"]
        assert program.errors == ""


@on_both_loops
def test_what_outlives_the_grace_period_is_cancelled_and_named(loop: str) -> None:
    with Program(SCRIPT, loop, "0.3", "at_once,never") as program:
        program.until("UP", role="never")
        program.send(signal.SIGTERM)
        assert program.until("DRAIN_INCOMPLETE")["roles"] == ["never"]
        assert program.end() == 0
        assert program.types()[-2:] == ["STOPPED", "RETURNED"]


@on_both_loops
def test_what_outlives_its_cancellation_is_left_behind(loop: str) -> None:
    with Program(SCRIPT, loop, "0.3", "at_once,deaf") as program:
        program.until("UP", role="deaf")
        program.send(signal.SIGTERM)
        assert program.end() == 0
        assert program.seen[-1] == {"type": "STOPPED", "pid": program.pid, "exitCode": 0, "hanging": ["deaf"]}
        assert program.errors == ""


@on_both_loops
@pytest.mark.parametrize("drain", ["never", "blocking"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(loop: str, drain: str, number: signal.Signals, code: int) -> None:
    with Program(SCRIPT, loop, "60", drain) as program:
        program.until("UP")
        program.send(signal.SIGTERM)
        program.until("BLOCKING" if drain == "blocking" else "DRAINING")
        program.send(number)
        assert program.end() == code
        assert program.errors == ""


@on_both_loops
def test_a_second_signal_wakes_a_loop_that_is_about_to_sleep(loop: str) -> None:
    with Program(SCRIPT, loop, "60", "asked") as program:
        program.until("UP")
        program.send(signal.SIGTERM)
        # Without the descriptor, a signal between the loop's last look and its sleep waits for the next timer.
        assert program.until("ASKED")["wakes"]
        assert program.end() == 0


@on_both_loops
def test_a_child_leaves_the_second_signal_to_its_parent(loop: str) -> None:
    with Program(SCRIPT, loop, "1", "never", "child") as program:
        program.until("UP")
        program.send(signal.SIGTERM)
        program.until("DRAINING")
        program.send(signal.SIGTERM)
        program.send(signal.SIGINT)
        program.until("DRAIN_INCOMPLETE")
        assert program.end() == 0


def test_under_nohup_a_hangup_is_ignored() -> None:
    ignoring = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SCRIPT
    with Program(ignoring, "asyncio", "20", "at_once") as program:
        program.until("UP")
        program.send(signal.SIGHUP)
        program.send(signal.SIGTERM)
        assert program.until("DRAINING")["reason"] == "SIGTERM"
        assert program.end() == 0


PARENTED = "from orderflow.parent import watch_parent; watch_parent(float(sys.argv[2]))\n" + SCRIPT


@on_both_loops
def test_the_end_of_the_parent_s_pipe_drains(loop: str) -> None:
    with Program(PARENTED, loop, "20", "at_once", "child", stdin=subprocess.PIPE) as program:
        program.until("UP")
        assert program.process.stdin is not None
        program.process.stdin.close()
        assert program.end() == 0
        assert "DOWN" in program.types()


def test_the_end_of_the_parent_s_pipe_ends_a_blocked_process_too() -> None:
    with Program(PARENTED, "asyncio", "0.2", "blocking", "child", stdin=subprocess.PIPE) as program:
        program.until("UP")
        assert program.process.stdin is not None
        program.process.stdin.close()
        program.until("BLOCKING")
        assert program.end() == 1


@pytest.mark.parametrize(
    ("times", "allowed"),
    [
        ([0], [True]),
        ([0, 1, 2], [True, True, False]),
        ([0, 1, 10.5], [True, True, True]),
        ([0, 10, 20, 30], [True, True, True, True]),
        ([0, 9, 9.5, 9.9], [True, True, False, False]),
    ],
)
def test_the_budget_counts_within_its_window(times: list[float], allowed: list[bool]) -> None:
    budget = CrashBudget(2, 10.0)
    assert [budget.allows_restart(now) for now in times] == allowed


@given(st.integers(1, 10**6))
def test_the_delay_stays_within_its_bounds(failures: int) -> None:
    ceiling = min(2.0, 0.1 * 2 ** min(failures - 1, 10))
    assert ceiling / 2 <= restart_delay(failures) <= ceiling


def test_a_group_of_errors_means_what_weighs_most_in_it() -> None:
    away, wrong, bug = DependencyUnavailable("away"), Misconfigured("wrong"), KeyError("bug")
    assert told(bug) is bug
    assert told(ExceptionGroup("", [away, ExceptionGroup("", [bug, wrong])])) is wrong
    assert told(ExceptionGroup("", [away, ExceptionGroup("", [bug])])) is bug
    assert told(ExceptionGroup("", [away])) is away


def test_a_description_is_one_line() -> None:
    assert described(ValueError("a\nb\t c")) == "ValueError: a b c"
    assert described(TimeoutError()) == "TimeoutError"
    assert len(described(ValueError("x" * 10_000))) == 500
