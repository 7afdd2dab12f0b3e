"""The CPU time and memory of real processes, as /proc tells it, and the arithmetic of the benchmarks that watch them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from orderflow.bench import usage
from orderflow.bench.drain import rates
from orderflow.bench.running import rate
from orderflow.bench.scaling import rebalance_cost
from orderflow.bench.usage import Meter, Usage, resident, role

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
pytestmark = pytest.mark.timeout(60)

MEGABYTE = 1024 * 1024
# Tells when it has burnt the seconds of CPU that its first argument names, then waits for the end of its input.
BURN = """
import sys, time
end = time.process_time() + float(sys.argv[1])
while time.process_time() < end:
    pass
print("burnt", flush=True)
sys.stdin.read()
"""
# Runs BURN as a child to its end, and tells.
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {BURN!r}, *sys.argv[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
print("burnt", flush=True)
sys.stdin.read()
"""


@asynccontextmanager
async def running(*command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def burnt(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b"burnt\n"


@linux
async def test_a_process_is_named_by_its_role_and_has_its_time_and_its_peak() -> None:
    async with running(sys.executable, "-c", BURN, "0.3", "--role", "worker") as process:
        meter = Meter({"program": process.pid})
        meter.start()
        await burnt(process)
        (used,) = await meter.stop()
    assert (used.name, used.pid) == ("worker", process.pid)
    assert 0.2 < used.cpu_seconds < 1.0
    assert 3 * MEGABYTE < used.peak_bytes < 100 * MEGABYTE


@linux
async def test_what_was_used_before_the_start_does_not_count() -> None:
    async with running(sys.executable, "-c", BURN, "0.3") as process:
        await burnt(process)
        meter = Meter({"program": process.pid})
        meter.start()
        (used,) = await meter.stop()
    assert used.name == "program"
    assert used.cpu_seconds < 0.1


@linux
@pytest.mark.parametrize("seconds", ["0.3", "1.2"])
async def test_the_time_of_a_child_that_has_ended_is_not_lost(seconds: str) -> None:
    # The short one ends before it has been seen at all, the long one between two samples.
    async with running(sys.executable, "-c", PARENT, seconds, "--role", "api") as process:
        meter = Meter({"program": process.pid})
        meter.start()
        await burnt(process)
        usages = await meter.stop()
    assert {usage.name for usage in usages} == {"api"}
    assert usages[0].pid == process.pid
    assert float(seconds) - 0.05 < sum(usage.cpu_seconds for usage in usages) < float(seconds) + 0.5


@linux
async def test_a_process_that_has_ended_is_listed_as_it_was_last_seen() -> None:
    async with running(sys.executable, "-c", BURN, "0") as process:
        await burnt(process)
        meter = Meter({"program": process.pid, "nobody": 2**22 + 1})
        meter.start()
    (used,) = await meter.stop()
    assert used.name == "program"
    assert used.peak_bytes > 3 * MEGABYTE


@linux
async def test_a_server_is_the_sum_of_its_processes() -> None:
    script = f"{sys.executable} -c '{BURN}' 0.2 </dev/null & {sys.executable} -c '{BURN}' 0.2 </dev/null & wait; read end"
    async with running("/bin/sh", "-c", script) as process:
        meter = Meter({"server": process.pid})
        meter.start()
        await burnt(process)
        await burnt(process)
        (used,) = await meter.stop()
    assert (used.name, used.pid) == ("server", process.pid)
    assert 0.3 < used.cpu_seconds < 1.0


@linux
async def test_a_process_that_is_reaped_between_two_reads_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    read = usage._read
    ended: list[int] = []

    def ends_first(pid: int, given: str | None) -> usage._Process | None:
        if pid not in (process.pid, *ended):
            ended.append(pid)
            os.kill(pid, signal.SIGKILL)
            while Path(f"/proc/{pid}").exists():
                os.sched_yield()
        return read(pid, given)

    async with running("/bin/sh", "-c", f"exec 3<&0; {sys.executable} -c '{BURN}' 0.3 <&3 & wait; read end") as process:
        meter = Meter({"server": process.pid})
        meter.start()
        await burnt(process)
        monkeypatch.setattr(usage, "_read", ends_first)
        (used,) = await meter.stop()
    assert ended
    assert 0.25 < used.cpu_seconds < 1.0


@linux
async def test_a_root_inside_of_another_tree_is_counted_once() -> None:
    async with running(sys.executable, "-c", BURN, "0.3") as process:
        meter = Meter({"us": os.getpid(), "child": process.pid})
        meter.start()
        await burnt(process)
        usages = await meter.stop()
    by_name = {usage.name: usage for usage in usages}
    assert 0.2 < by_name["child"].cpu_seconds < 1.0
    assert by_name["us"].cpu_seconds < 0.2
    assert [usage.pid for usage in usages].count(process.pid) == 1


async def test_elsewhere_than_on_linux_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    meter = Meter({"us": os.getpid()})
    meter.start()
    found: list[Usage] = await meter.stop()
    assert found == []


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["python", "-m", "orderflow", "run"], ""),
        (["python", "-m", "orderflow", "run", "--role", "api"], "api"),
        (["python", "-m", "orderflow", "run", "--role", "api", "--role", "worker"], "api+worker"),
        (["python", "-m", "orderflow", "run", "--role"], ""),
    ],
)
def test_the_role_stands_on_the_command_line(command: list[str], name: str) -> None:
    assert role(command) == name


@linux
def test_what_is_resident_now() -> None:
    rss, pss = resident(os.getpid())
    assert 3 * MEGABYTE < pss <= rss
    assert resident(2**22 + 1) == (0, 0)


def test_the_rates_of_a_drain_are_read_between_the_looks() -> None:
    # 100 a second, then 50 a second.
    growth = [(10.0, 0), (11.0, 100), (12.0, 200), (14.0, 300), (16.0, 400)]
    assert rates(growth, 400) == pytest.approx((400 / 6, 100.0, 50.0))
    # All of it between two looks; and records that nobody has asked for after the last one.
    assert rates([(0.0, 0), (2.0, 100)], 100) == pytest.approx((50.0, 50.0, 50.0))
    assert rates([(0.0, 0), (2.0, 110)], 100) == pytest.approx((55.0, 55.0, 55.0))


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [(0.0, 1.0, 10.0), (0.5, 1.0, 14.0), (0.5, 0.6, 12.0), (-1.0, 0.25, 4.0), (1.0, 2.0, 0.0), (0.75, 1.25, 8.0)],
)
def test_a_rate_is_taken_to_the_nearest_slots(begin: float, end: float, expected: float) -> None:
    assert rate([1, 2, 3, 4], begin, end) == expected


def test_a_rebalance_costs_what_stood_still_and_what_was_slow() -> None:
    steady = [0, 0, 0, 0, 100, 100, 100, 100]
    assert rebalance_cost([*steady, 100, 100, 100], 2.0) == (0.0, 0.0)
    # Three slots without progress, one of half the rate, and then what was held up all at once.
    assert rebalance_cost([*steady, 100, 0, 9, 0, 50, 500], 2.0) == pytest.approx((0.75, 0.25 * 3.41))
    # Nothing was PAID before it joined, or there was no time before.
    assert rebalance_cost([0, 0, 1], 0.3) == pytest.approx((0.25, 0.25))
    assert rebalance_cost([], -1.0) == (0.0, 0.0)
