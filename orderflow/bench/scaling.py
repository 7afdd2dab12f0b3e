"""T16: T1 with more and more processes, and what a rebalance costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from orderflow.bench import database
from orderflow.bench.load import SLOT
from orderflow.bench.program import Program
from orderflow.bench.running import beside, running
from orderflow.bench.servers import Servers
from orderflow.bench.throughput import SETTLE_TIMEOUT, Audited, paying_settings

DELAY_MS = 500
WORKERS = (1, 2, 4, 8)
PUBLISHERS = (1, 2, 4)
# Less than this share of the median slot before is no progress.
STALLED = 0.1
REBALANCE_SECONDS = 10.0


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
