"""T16: T1 with more and more processes, and what a rebalance costs; and the run under load beside which something happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import asyncpg

from orderflow.bench import database
from orderflow.bench.load import SLOT, Options, Summary
from orderflow.bench.program import Program, ProgramFailed
from orderflow.bench.sending import send
from orderflow.bench.servers import Servers, Target
from orderflow.bench.throughput import SETTLE_TIMEOUT, Audited, audit_run, paid_over_time, paying_settings, record_file

T = TypeVar("T")

DELAY_MS = 500
WORKERS = (1, 2, 4, 8)
PUBLISHERS = (1, 2, 4)
# Less than this share of the median slot before is no progress.
STALLED = 0.1
REBALANCE_SECONDS = 10.0


class Run:
    """A program on one target, from its start to the audit of what it has written; made by `running`."""

    def __init__(self, target: Target, program: Program, connection: asyncpg.Connection, record: Path, since: datetime) -> None:
        self.target = target
        self.program = program
        self.connection = connection
        self._record = record
        self._since = since
        self._loads = 0

    async def load(self, seconds: float, connections: int) -> Summary:
        """Place orders in a closed loop for that long. Raises ProgramFailed."""
        self._loads += 1
        at = self.program.address
        return await send(Options(at.host, at.port, connections, seconds, str(self._record), seed=self._loads))

    async def warm_up(self, seconds: float, connections: int) -> None:
        """Connections, prepared statements and the consumer group's first assignment belong to the start."""
        await self.load(seconds, connections)
        if not await self.settled(SETTLE_TIMEOUT):
            raise ProgramFailed(f"the warm-up did not settle within {SETTLE_TIMEOUT:.0f} s: {self.program.log_tail()}")

    async def settled(self, timeout: float) -> bool:
        """Wait until everything is; False after `timeout` seconds."""
        return await database.until_settled(self.connection, timeout=timeout, since=self._since)

    async def paid(self, load: Summary) -> list[int]:
        """Orders that became PAID in each SLOT seconds since the first POST: from their own history, so it costs no run."""
        return await paid_over_time(self.connection, load.first_sent)

    async def end(self, name: str, load: Summary | None, *, timeout: float = SETTLE_TIMEOUT) -> Audited:
        """Stop the program when everything is settled, or after `timeout` seconds, and audit the database."""
        settled = await self.settled(timeout)
        code = await self.program.stop()
        audited = await audit_run(
            self.connection, name, self._record, settled=settled, code=code, load=load, since=self._since
        )  # fmt: skip
        self.program.log.unlink(missing_ok=True)
        return audited


@asynccontextmanager
async def running(target: Target, directory: Path, arguments: Sequence[str], settings: Mapping[str, str]) -> AsyncIterator[Run]:
    """`orderflow run` with these arguments and settings against that target. Raises EmbeddedError, ProgramFailed."""
    record = record_file(directory, target)
    connection = await database.connected(target.database_url)
    try:
        since = await connection.fetchval("SELECT now()")
        program = Program(arguments, settings, directory, name=record.stem)
        await program.start()
        try:
            yield Run(target, program, connection, record, since)
        finally:
            await program.stop()
    finally:
        await connection.close(timeout=5)


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Have `work` done during the block; what is not done at its end is cancelled."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def rate(paid: Sequence[int], begin: float, end: float) -> float:
    """Orders a second between two times in seconds since the first POST, to the nearest slots and over one at least."""
    first = max(0, round(begin / SLOT))
    last = max(first + 1, round(end / SLOT))
    return sum(paid[first:last]) / ((last - first) * SLOT)


@dataclass(frozen=True, slots=True)
class Rate:
    """One run as T1 counts it: `seconds` from the first POST until the last order was seen PAID."""

    orders: int
    seconds: float
    audited: Audited

    @property
    def orders_per_second(self) -> float:
        """The figure."""
        return self.orders / self.seconds


@dataclass(frozen=True, slots=True)
class Rebalance:
    """One more worker process joins under load. `paid`: orders PAID in each SLOT seconds of the load.

    `joined`: the seconds from there to the start of that process. `stalled_seconds`: the longest time after it without
    progress, that is with less than a tenth of the median slot before. `behind_seconds`: how far the orders PAID fell behind
    the rate before, at the most, within ten seconds; it counts what is slow as well as what stands still.
    """

    paid: list[int]
    joined: float
    stalled_seconds: float
    behind_seconds: float
    audited: Audited


@dataclass(frozen=True, slots=True)
class Scaling:
    """T16, by number of processes: `workers` beside one publisher, `publishers` beside two workers; one API in both."""

    workers: dict[int, Rate]
    publishers: dict[int, Rate]
    rebalance: Rebalance

    @property
    def audits(self) -> list[Audited]:
        """Of every run."""
        return [*(one.audited for one in (*self.workers.values(), *self.publishers.values())), self.rebalance.audited]


async def measure(
    servers: Servers, directory: Path, *, seconds: float, connections: int, warm_up: float,
    workers: Sequence[int] = WORKERS, publishers: Sequence[int] = PUBLISHERS,
) -> Scaling:  # fmt: skip
    """T1 with the gateway at 500 ms for each number of processes, `seconds` of load each, then the rebalance.

    Raises EmbeddedError, ProgramFailed.
    """

    async def one(workers: int, publishers: int) -> Rate:
        async with (
            servers.fresh() as target,
            running(target, directory, _split(workers, publishers), paying_settings(target, delay_ms=DELAY_MS)) as run,
        ):
            await run.warm_up(warm_up, connections)
            load = await run.load(seconds, connections)
            await database.until_no_order_in_flight(run.connection, timeout=SETTLE_TIMEOUT)
            took = time.time() - load.first_sent
            return Rate(load.accepted, took, await run.end(f"{workers} workers, {publishers} publishers", load))

    return Scaling(
        {count: await one(count, 1) for count in workers},
        {count: await one(2, count) for count in publishers},
        await rebalance(servers, directory, seconds=seconds, connections=connections, warm_up=warm_up),
    )


def _split(workers: int, publishers: int) -> tuple[str, ...]:
    return ("--api", "1", "--publisher", str(publishers), "--worker", str(workers))


async def rebalance(servers: Servers, directory: Path, *, seconds: float, connections: int, warm_up: float) -> Rebalance:
    """`seconds` under load with one worker process, then another is started, then the load goes on for as long."""
    async with servers.fresh() as target:
        settings = paying_settings(target, delay_ms=DELAY_MS)
        async with running(target, directory, _split(1, 1), settings) as run:
            await run.warm_up(warm_up, connections)
            second = Program(
                ("--role", "worker"), {**settings, "ORDERFLOW_WORKER_ID": "payment-worker-2"}, directory,
                name=f"{target.topic}-second",
            )  # fmt: skip
            try:
                async with beside(_join(second, seconds)) as joining:
                    load = await run.load(2 * seconds, connections)
                    joined = await joining - load.first_sent
                await run.settled(SETTLE_TIMEOUT)
            finally:
                code = await second.stop()
            audited = await run.end("a second worker joins", load)
            if code:
                audited.problems.append(f"the worker process that joined ended with exit code {code}: {second.log_tail()}")
            paid = (await run.paid(load))[: round(2 * seconds / SLOT)]
    return Rebalance(paid, joined, *rebalance_cost(paid, joined), audited)


async def _join(program: Program, after: float) -> float:
    """Start it `after` seconds from now; returns the Unix seconds at which it was."""
    await asyncio.sleep(after)
    joined = time.time()
    await program.start()
    return joined


def rebalance_cost(paid: Sequence[int], joined: float) -> tuple[float, float]:
    """Seconds stalled, and seconds behind, after a process joined `joined` seconds after the begin; see Rebalance."""
    at = max(1, int(joined / SLOT))
    # The first second is the load's own beginning.
    usual = max(1, median(paid[min(round(1 / SLOT), at - 1) : at] or [0]))
    longest = stalled = behind = lag = 0.0
    for orders in paid[at : at + round(REBALANCE_SECONDS / SLOT)]:
        stalled = stalled + SLOT if orders < STALLED * usual else 0.0
        lag += SLOT * (1 - orders / usual)
        longest, behind = max(longest, stalled), max(behind, lag)
    return longest, behind
