"""Retention: what is old and finished is deleted, in small batches, and never what a redelivery could still need.

An order's events, their deliveries, its discarded dead letters and its charges go in one statement, which notes on the order
that they are gone (`retired_at`); the order stays. Nothing goes before all of it is settled and older than the retention, nor
while Kafka may still have a record of it, nor of an order of which an invariant does not hold. Old rows are found at the low
end of `outbox_log`; what a batch costs does not grow with the tables.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Final
from uuid import UUID

import asyncpg

from orderflow.audit import I1, I2, I3, violations_of
from orderflow.engine.kafka import Kafka
from orderflow.engine.outbox import SHARDS
from orderflow.engine.patience import ENDLESS, DependencyUnavailable, within
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.seams import seam
from orderflow.engine.telemetry import PUBLISHER, emit

# One process at a time; the others' batches end at once.
RETENTION_LOCK: Final = 0x6F66_0011_0000_0000
# Events of one shard that a batch looks at; of one aggregate, at the most; pages of a table that is gone through page by page.
PAGE: Final = 16
MOST_EVENTS: Final = 100
PAGES: Final = 128
# Seconds between two batches, and between two rounds through the tables.
PAUSE: Final = 0.1
EVERY: Final = 600.0
# A relay takes whoever writes to the outbox for longer than a second for a long writer: nothing here waits that long.
LOCK_TIMEOUT_MS: Final = 500

# A shard is read up to its first row that is too young.
_PAGE: Final = """
WITH page AS (
    SELECT o.shard, o.seq, o.aggregate_id,
           min(o.seq) FILTER (WHERE o.created_at BETWEEN now() - $4::interval AND now()) OVER (PARTITION BY o.shard) AS young
    FROM unnest($1::smallint[], $2::bigint[]) AS s(shard, after) CROSS JOIN LATERAL (
        SELECT * FROM outbox WHERE shard = s.shard AND seq > s.after ORDER BY seq LIMIT $3) AS o)
SELECT shard, max(seq) AS reached, array_agg(DISTINCT aggregate_id) AS aggregates
FROM page WHERE young IS NULL OR seq < young GROUP BY shard
"""

# Of an order all events or none; of other aggregates each event for itself. What comes back of a NULL is kept.
_FINISHED: Final = """
WITH found AS (
    SELECT e.event_id, e.aggregate_id, coalesce(
               greatest(e.created_at, e.published_at, p.processed_at,
                        CASE WHEN d.event_id IS NOT NULL THEN coalesce(d.discarded_at, 'infinity') END) < now() - $2::interval
               AND (p.event_id IS NOT NULL OR d.event_id IS NOT NULL)
               AND (e.available_at = 'infinity' OR e.available_at IS NULL AND e.published_at IS NOT NULL), false) AS finished
    FROM unnest($1::uuid[]) AS a(id)
    CROSS JOIN LATERAL (SELECT * FROM outbox WHERE aggregate_id = a.id ORDER BY seq LIMIT $3) AS e
    LEFT JOIN processed_events p ON p.event_id = e.event_id
    LEFT JOIN dead_letter_events d ON d.event_id = e.event_id)
SELECT f.aggregate_id, o.id IS NOT NULL AS is_order, array_agg(f.event_id) AS event_ids
FROM found f LEFT JOIN orders o ON o.id = f.aggregate_id
WHERE o.id IS NOT NULL OR f.finished
GROUP BY f.aggregate_id, o.id, o.state, o.updated_at
HAVING o.id IS NULL
    OR (o.state IN ('PAID', 'FAILED') AND o.updated_at < now() - $2::interval AND bool_and(f.finished) AND count(*) < $3)
"""

_RETIRE: Final = """
WITH retired AS (UPDATE orders SET retired_at = now() WHERE id = ANY($2::uuid[]) AND state IN ('PAID', 'FAILED') RETURNING id),
charges AS (DELETE FROM gateway_charges c USING retired r WHERE c.reference = r.id),
gone AS (DELETE FROM outbox WHERE event_id = ANY($1::uuid[]) RETURNING event_id),
deliveries AS (DELETE FROM processed_events p USING gone g WHERE p.event_id = g.event_id),
letters AS (DELETE FROM dead_letter_events d USING gone g WHERE d.event_id = g.event_id)
SELECT count(*) FROM gone
"""

# Tables that no index leads through by time, and which of their rows nothing needs after an age, $3. The letters are those of
# records that were no events of ours; the others go along with their events.
_KEYS: Final = "idempotency_keys"
_LETTERS: Final = "dead_letter_events"
_EXPIRED: Final = {
    _KEYS: "created_at < now() - $3::interval",
    _LETTERS: "discarded_at < now() - $3::interval"
    f" AND NOT EXISTS (SELECT FROM outbox o WHERE o.event_id = {_LETTERS}.event_id)",
}
_KEYS_LIVE: Final = timedelta(hours=24)
_PAGES_OF: Final = "SELECT pg_relation_size($1::text::regclass) / current_setting('block_size')::integer"


async def refusal(kafka: Kafka, days: int) -> str | None:
    """Why nothing may be retired after that many days, for people; None when it may."""
    if not days:
        return "ORDERFLOW_RETENTION_DAYS is 0"
    if kafka.embedded:
        return "the embedded broker does not tell how long it keeps a record"
    try:
        kept = await kafka.kept_for()
    except DependencyUnavailable as error:
        return f"how long Kafka keeps a record is not known: {error}"
    if kept is None:
        return f"Kafka keeps the records of {kafka.topic} without an end: give the topic a retention.ms"
    if kept >= timedelta(days=days):
        return (
            f"Kafka keeps a record of {kafka.topic} for up to {kept / timedelta(days=1):.1f} days (retention.ms + segment.ms), "
            f"and ORDERFLOW_RETENTION_DAYS is {days}: raise it above that"
        )
    return None


class Retention:
    """Goes round the tables and deletes what is older than `days` and finished; 0: expired idempotency keys only.

    Whether Kafka forgets its records earlier is asked before each round. While it does not, every event is kept.
    """

    name = "retention"

    def __init__(self, open_database: Callable[[], Awaitable[Database]], kafka: Kafka, *, days: int = 30) -> None:
        self._open_database = open_database
        self._kafka = kafka
        self._days = days
        self._age = timedelta(days=days)
        # Where the round under way goes on: after that number in each shard, at that page of each table. Empty: between two.
        self._after: dict[int, int] = {}
        self._page_of: dict[str, int] = {}
        self._events = 0
        self._orders = 0

    async def run(self, stopping: asyncio.Event) -> None:
        """Work in batches until `stopping` is set."""
        database = await self._open_database()
        try:
            while not stopping.is_set():
                try:
                    await ENDLESS.run(lambda: self.run_once(database))
                except asyncpg.PostgresError as error:
                    # Not worth a publisher's life: without the right to delete, say, everything is kept.
                    self._after, self._page_of = {}, {}
                    emit(PUBLISHER, "RETENTION_REFUSED", reason=f"PostgreSQL: {error} (see `orderflow doctor`)")
                with contextlib.suppress(TimeoutError):
                    await within(stopping.wait(), PAUSE if self.is_under_way else EVERY)
        finally:
            await database.close()

    @property
    def is_under_way(self) -> bool:
        """Whether the round has more to look at."""
        return bool(self._after or self._page_of)

    @seam
    async def run_once(self, database: Database) -> int:
        """One batch; returns how many events were deleted.

        Raises a transient error when a row of the batch was locked or changed meanwhile: nothing of it has gone, and the next
        batch goes on after it.
        """
        if not self.is_under_way:
            await self._begin()
        # One snapshot: what is judged in it and changed before it is deleted, ends the transaction.
        async with database.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            await connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", RETENTION_LOCK):
                self._after, self._page_of = {}, {}
                return 0
            for table in tuple(self._page_of):
                await self._expire(connection, table)
            events, orders = await self._finished(connection, await self._page(connection)) if self._after else ([], [])
            gone: int = await connection.fetchval(_RETIRE, events, orders) if events else 0
        self._events, self._orders = self._events + gone, self._orders + len(orders)
        if self._events and not self.is_under_way:
            emit(PUBLISHER, "RETIRED", orders=self._orders, events=self._events, retentionDays=self._days)
            self._events = self._orders = 0
        return gone

    async def _begin(self) -> None:
        refused = await refusal(self._kafka, self._days)
        if refused and self._days and not self._kafka.embedded:
            emit(PUBLISHER, "RETENTION_REFUSED", reason=refused)
        self._after = {} if refused else dict.fromkeys(range(SHARDS), 0)
        self._page_of = dict.fromkeys((_KEYS,) if refused else (_KEYS, _LETTERS), 0)

    @seam
    async def _page(self, connection: Connection) -> set[UUID]:
        """The aggregates of the next page of old events; the round's way through the outbox ends where there is none."""
        rows = await connection.fetch(_PAGE, list(self._after), list(self._after.values()), PAGE, self._age)
        # Before anything is deleted: a batch that fails must not be tried for ever.
        self._after = {row["shard"]: row["reached"] for row in rows}
        return {aggregate_id for row in rows for aggregate_id in row["aggregates"]}

    @seam
    async def _finished(self, connection: Connection, aggregates: set[UUID]) -> tuple[Sequence[UUID], Sequence[UUID]]:
        """Which events of these aggregates may go, and which orders with them."""
        rows = await connection.fetch(_FINISHED, aggregates, self._age, MOST_EVENTS)
        orders = {row["aggregate_id"] for row in rows if row["is_order"]}
        if orders:
            # What is wrong with an order is not to be found out without its events and charges.
            orders -= {found.order_id for found in await violations_of(connection, (I1, I2, I3), list(orders))}
        allowed = [row for row in rows if not row["is_order"] or row["aggregate_id"] in orders]
        return [event_id for row in allowed for event_id in row["event_ids"]], list(orders)

    @seam
    async def _expire(self, connection: Connection, table: str) -> None:
        begin = self._page_of[table]
        if begin >= await connection.fetchval(_PAGES_OF, table):
            del self._page_of[table]
            return
        self._page_of[table] = begin + PAGES
        await connection.execute(
            f"DELETE FROM {table} WHERE ctid >= $1::tid AND ctid < $2::tid AND {_EXPIRED[table]}",
            (begin, 0), (begin + PAGES, 0), _KEYS_LIVE if table == _KEYS else self._age,
        )  # fmt: skip
