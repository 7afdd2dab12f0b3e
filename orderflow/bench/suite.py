"""The suite: which benchmarks there are, what each needs beside it, and the rounds in which they alternate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import asyncpg
from aiokafka.errors import KafkaError

from orderflow.bench import benchmarks, conditions, targets
from orderflow.bench.context import Bench
from orderflow.bench.extent import Extent
from orderflow.bench.program import ProgramFailed
from orderflow.bench.results import Results
from orderflow.bench.servers import Servers
from orderflow.embedded.errors import EmbeddedError
from orderflow.engine.patience import DependencyUnavailable

NAMES: dict[str, str] = {
    "A": "reference: bare aiohttp answers the same POST and stores nothing",
    "B": "reference: pgbench -c 8, one order's five transactions step by step",
    "C": "reference: a producer called right after the commit, no outbox",
    "D": "reference: the same row changes by hand in groups of 500, SQL only",
    "T1": "end to end, HTTP POST to PAID, gateway 0 ms, best role split",
    "T2": "the same, all roles in one process",
    "T3": "POST accepted durably, one API process",
    "T4": "T1 with the gateway at 500 ms",
    "T5": "commit to consumer at 50 events/s",
    "T6": "commit to consumer at 500 events/s over 8 connections",
    "T7": "HTTP POST to PAID at 20/s",
    "T8": "the relay alone drains a backlog",
    "T9": "growth: T1 with millions of settled orders there",
    "T10": "T1 while a transaction pins xmin",
    "T11": "T1 while 20 % of charges fail once",
    "T12": "T1 while half of all events have one key",
    "T13": "idle: CPU and statements",
    "T14": "start until ready, and --help",
    "T15": "resident memory when idle",
    "T16": "T1 with more and more processes, and a rebalance",
    "T17": "T1 with logging on against off",
    "LOAD": "latency of T7 at rising rates, for the plot",
}
# A ratio is worth something only when its reference was measured in the same run.
NEEDS: dict[str, tuple[str, ...]] = {
    "T1": ("B", "D", "T2"), "T2": ("B",), "T3": ("A",), "T4": ("T1",), "T5": ("C",), "T6": ("C",), "T9": ("T1",),
    "T10": ("T1",), "T11": ("T1",), "T12": ("T1",), "T15": ("T13",), "T17": ("T1",),
}  # fmt: skip
STEPS = benchmarks.STEPS | conditions.STEPS
FAILURES = (
    EmbeddedError, ProgramFailed, DependencyUnavailable, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, KafkaError,
)  # fmt: skip


def with_needed(names: Iterable[str]) -> list[str]:
    """The benchmarks to run for these names, each after what it needs; all for none."""
    wanted = set(names) or set(NAMES)
    ordered: list[str] = []

    def add(name: str) -> None:
        for need in NEEDS.get(name, ()):
            add(need)
        if name not in ordered:
            ordered.append(name)

    for name in NAMES:
        if name in wanted:
            add(name)
    return ordered


class Suite:
    """Runs the benchmarks round by round, alternating, so that a slow minute of the machine meets all of them.

    `tell` hears, before each measurement, how much of the whole is done (0 to 1), and what comes now.
    """

    def __init__(
        self, servers: Servers, directory: Path, names: Iterable[str], extent: Extent,
        tell: Callable[[float, str], None] = lambda done, text: None,
    ) -> None:  # fmt: skip
        self._servers = servers
        self._directory = directory
        self._names = with_needed(names)
        self._extent = extent
        self._tell = tell
        self.results = Results(targets.figures(extent))

    async def run(self) -> Results:
        """All rounds. What fails is told in the results, and ends neither the round nor what does not need it.

        A cancellation, as by Ctrl-C, ends it: what was measured by then is returned.
        """
        extent = self._extent
        planned = [
            (number, name)
            for number in range(1, extent.rounds + 1)
            for name in self._names
            if number <= extent.rounds_of(name)
        ]  # fmt: skip
        failed: set[tuple[int, str]] = set()
        async with AsyncExitStack() as stack:
            bench = Bench(self._servers, self._directory, extent, self.results, stack)
            for at, (number, name) in enumerate(planned):
                where = f"round {number} of {extent.rounds}"
                bench.round = number
                bench.say = lambda what, at=at, where=where: self._tell(at / len(planned), f"{where}: {what}")  # type: ignore[misc]
                try:
                    if not any((number, need) in failed for need in NEEDS.get(name, ())):
                        await STEPS[name](bench)
                        continue
                except asyncio.CancelledError:
                    self.results.failures.append(f"{name}, {where}: interrupted; the figures are what was measured by then")
                    cast(asyncio.Task[Any], asyncio.current_task()).uncancel()
                    break
                except FAILURES as error:
                    self.results.failures.append(f"{name}, {where}: {str(error) or type(error).__name__}")
                failed.add((number, name))
        return self.results
