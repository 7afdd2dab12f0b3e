"""T10: T1 while a transaction stays open, so that no dead row can be removed and no later commit is safely the last."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from orderflow.bench import database
from orderflow.bench.running import beside, rate, running
from orderflow.bench.servers import Servers, Target
from orderflow.bench.throughput import SPLITS, Audited, paying_settings

# The settling of what a quarter of an hour has left may take as long as it takes.
SETTLE_TIMEOUT = 600.0
PARTS = 10


@dataclass(frozen=True, slots=True)
class Pinned:
    """Orders PAID a second. `before` the transaction, in each tenth of its life, and in each tenth of the time after its end.

    `paid`: orders PAID in each SLOT seconds since the first POST.
    """

    before: float
    during: list[float]
    after: list[float]
    paid: list[int]
    audited: Audited

    @property
    def during_rate(self) -> float:
        """Over the transaction's whole life."""
        return sum(self.during) / PARTS

    @property
    def after_rate(self) -> float:
        """In the last three tenths of the time after: with a minute of it, what is back within a minute."""
        return sum(self.after[-3:]) / 3


async def measure(
    servers: Servers, directory: Path, *, split: str, seconds: float, connections: int, warm_up: float,
    before: float = 30.0, after: float = 60.0,
) -> Pinned:  # fmt: skip
    """T1's load for `before` + `seconds` + `after`; for `seconds` a repeatable read transaction with an id of its own is open.

    One load all the time, gateway 0 ms: what the rate falls to, and what it comes back to, is seen on the same tables.
    Raises EmbeddedError, ProgramFailed.
    """
    async with (
        servers.fresh() as target,
        running(target, directory, SPLITS[split], paying_settings(target, delay_ms=0)) as run,
    ):
        await run.warm_up(warm_up, connections)
        async with beside(_pin(target, before, seconds)) as pinning:
            load = await run.load(before + seconds + after, connections)
            begun, ended = (moment - load.first_sent for moment in await pinning)
        audited = await run.end(f"{seconds:g} s with a pinned transaction", load, timeout=SETTLE_TIMEOUT)
        paid = await run.paid(load)
    # Neither the first second of the load belongs to the rate before, nor what settles after its end to the rate after.
    return Pinned(
        rate(paid, min(1.0, begun / 2), begun), _tenths(paid, begun, ended),
        _tenths(paid, ended, before + seconds + after), paid, audited,
    )  # fmt: skip


async def _pin(target: Target, wait: float, seconds: float) -> tuple[float, float]:
    """Hold the transaction open for `seconds`, `wait` seconds from now; returns its begin and end in Unix seconds."""
    connection = await database.connected(target.database_url)
    try:
        await asyncio.sleep(wait)
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("SELECT pg_current_xact_id()::text")
            begun = time.time()
            await asyncio.sleep(seconds)
        return begun, time.time()
    finally:
        await connection.close(timeout=5)


def _tenths(paid: list[int], begin: float, end: float) -> list[float]:
    step = (end - begin) / PARTS
    return [rate(paid, begin + step * number, begin + step * (number + 1)) for number in range(PARTS)]
