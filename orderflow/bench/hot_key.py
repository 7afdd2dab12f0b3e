"""T12: T1 while half of all events are about one order.

"The other keys keep 80 % of their rate" can be read in two ways. Against T1 alone, a run with as many events again also pays
for the publishing and consuming of those, whatever their keys are, and on saturated cores no program could keep its rate. The
fair reading asks what the *heat* costs: the same load beside the same number of extra events, once with a key each, and once
all with one key. That ratio is the figure (`heat_ratio`); the other one is measured too (`alone_ratio`), so that nothing is
hidden by the reading.

A hot key's own events come one after the other by right, so that it may fall behind. What must not happen is that it takes its
shard, its partition or its worker along: that is what the rate of the others shows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg

from orderflow.bench import database
from orderflow.bench.running import beside, rate, running
from orderflow.bench.servers import Servers, Target
from orderflow.bench.throughput import SPLITS, Audited, paying_settings

EVENT_TYPE: Final = "OrderNoted"
# Rows in one INSERT at the most, as a program writes them beside its other work, and the pause between two looks.
BATCH = 100
PAUSE = 0.01
# The hot key's own backlog is worked off after the load, one event after the other.
SETTLE_TIMEOUT = 600.0

_ANY_ORDER = "SELECT id FROM orders ORDER BY created_at LIMIT 1"
# The number of the last event of all, handed out without gaps by as much as matters here.
_EVENTS = "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('outbox', 'seq')::regclass), 0)"
_WRITE = """
INSERT INTO outbox (event_type, aggregate_type, aggregate_id, payload)
SELECT $1, 'order', coalesce($2::uuid, gen_random_uuid()), '{"note": "of interest to nobody"}'
FROM generate_series(1, $3::integer)
"""


@dataclass(frozen=True, slots=True)
class Beside:
    """One run: the orders' PAID rate a second while the load lasted, beside `extra` events that are about no other order.

    `settled_seconds`: from the end of the load until every event was consumed, the extra ones too.
    """

    orders_per_second: float
    extra: int
    settled_seconds: float
    audited: Audited


@dataclass(frozen=True, slots=True)
class HotKey:
    """T1 alone, beside extra events with a key each, and beside as many with one key."""

    alone: Beside
    spread: Beside
    hot: Beside

    @property
    def heat_ratio(self) -> float:
        """The figure: what the other keys keep of their rate when the extra events all have one key."""
        return self.hot.orders_per_second / self.spread.orders_per_second

    @property
    def alone_ratio(self) -> float:
        """What they keep of T1, the price of twice as many events included."""
        return self.hot.orders_per_second / self.alone.orders_per_second

    @property
    def audits(self) -> list[Audited]:
        """Of the three runs."""
        return [self.alone.audited, self.spread.audited, self.hot.audited]


async def measure(servers: Servers, directory: Path, *, split: str, seconds: float, connections: int, warm_up: float) -> HotKey:
    """The three runs, gateway 0 ms. Raises EmbeddedError, ProgramFailed."""

    async def one(name: str, *, extra: bool, hot: bool = False) -> Beside:
        async with (
            servers.fresh() as target,
            running(target, directory, SPLITS[split], paying_settings(target, delay_ms=0)) as run,
            _Notes.about(target, one_order=hot) as notes,
        ):
            await run.warm_up(warm_up, connections)
            async with beside(notes.write(as_many_as_others=extra)) as writing:
                load = await run.load(seconds, connections)
                if writing.done():
                    writing.result()
            ended = time.monotonic()
            await run.settled(SETTLE_TIMEOUT)
            settled = time.monotonic() - ended
            audited = await run.end(name, load, timeout=0.0)
            return Beside(rate(await run.paid(load), 0.0, seconds), notes.written, settled, audited)

    return HotKey(
        await one("T1 alone", extra=False),
        await one("T1 beside as many events of other keys", extra=True),
        await one("T1 beside as many events of one key", extra=True, hot=True),
    )


class _Notes:
    """Events that nobody handles, each about an order of its own that never was, or all about one that is there."""

    def __init__(self, connection: asyncpg.Connection, one_order: bool) -> None:
        self._connection = connection
        self._one_order = one_order
        self.written = 0

    @classmethod
    @asynccontextmanager
    async def about(cls, target: Target, *, one_order: bool) -> AsyncIterator[_Notes]:
        connection = await database.connected(target.database_url)
        try:
            yield cls(connection, one_order)
        finally:
            await connection.close(timeout=5)

    async def write(self, *, as_many_as_others: bool) -> None:
        """Until cancelled, see to it that half of all events since now are notes."""
        order_id = await self._connection.fetchval(_ANY_ORDER) if self._one_order else None
        before = await self._connection.fetchval(_EVENTS)
        while as_many_as_others:
            others = await self._connection.fetchval(_EVENTS) - before - self.written
            missing = min(BATCH, others - self.written)
            if missing > 0:
                await self._connection.execute(_WRITE, EVENT_TYPE, order_id, missing)
                self.written += missing
            else:
                await asyncio.sleep(PAUSE)
