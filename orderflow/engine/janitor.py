"""The janitor: finds events that were published and yet never settled, and publishes them again.

Kafka may lose what it acknowledged (a wiped disk, a broker of `dev` that forgets), and a worker may die between its fetch
and its settlement while its offsets move on. The outbox row is what brings the event, and so its order, to an end.

Every event is looked at once, when it has become old enough. One that is not settled then is watched until it is. And a patrol
goes round the whole table, some rows a turn, for what neither can know of: what an earlier janitor watched, an old event that
came back by a redrive, a row with a creation time of its own. What a turn costs does not grow with the table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from uuid import UUID

from orderflow.engine.outbox import SHARDS
from orderflow.engine.patience import ENDLESS, within
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.telemetry import PUBLISHER, emit

# One process at a time; the others' turns end at once.
JANITOR_LOCK = 0x6F66_0003_0000_0000
# Rows of one shard that one statement looks at; how many such statements a turn may take to catch up; events under watch.
PAGE = 640
MOST_PAGES = 100
MOST_WATCHED = 100_000
# So many horizons back does a janitor begin that has just been started.
REMEMBERED = 10

# A shard is read up to its first row that is too young to be judged.
_EXAMINE = """
WITH page AS (
    SELECT o.shard, o.seq, o.event_id,
           min(o.seq) FILTER (WHERE o.created_at BETWEEN now() - $4::interval AND now()) OVER (PARTITION BY o.shard) AS young
    FROM unnest($1::smallint[], $2::bigint[]) AS s(shard, after) CROSS JOIN LATERAL (
        SELECT * FROM outbox WHERE shard = s.shard AND seq > s.after ORDER BY seq LIMIT $3) AS o)
SELECT page.shard, max(page.seq) AS reached, count(*) AS rows,
       array_agg(page.event_id) FILTER (WHERE p.event_id IS NULL AND d.event_id IS NULL) AS unsettled
FROM page LEFT JOIN processed_events p ON p.event_id = page.event_id
     LEFT JOIN dead_letter_events d ON d.event_id = page.event_id
WHERE page.young IS NULL OR page.seq < page.young
GROUP BY page.shard
"""

_BEGINNING = """
SELECT shard, min(seq) - 1 AS seq FROM outbox WHERE created_at >= now() - $1::interval GROUP BY shard
"""
_END = "SELECT pg_sequence_last_value(pg_get_serial_sequence('outbox', 'seq')::regclass)"

_STILL_UNSETTLED = """
SELECT o.event_id FROM outbox o LEFT JOIN processed_events p ON p.event_id = o.event_id
     LEFT JOIN dead_letter_events d ON d.event_id = o.event_id
WHERE o.event_id = ANY($1::uuid[]) AND p.event_id IS NULL AND d.event_id IS NULL
"""

_REPUBLISH = """
UPDATE outbox SET published_at = NULL, available_at = now()
WHERE event_id = ANY($1::uuid[]) AND published_at < now() - $2::interval AND available_at IS DISTINCT FROM 'infinity'
RETURNING event_id
"""


class Janitor:
    """Reconciles every `horizon` / 4 seconds what was published longer than `horizon` seconds ago and is not settled."""

    name = "janitor"

    def __init__(self, open_database: Callable[[], Awaitable[Database]], *, horizon: float = 60.0) -> None:
        self._open_database = open_database
        self._seconds = horizon
        self._horizon = timedelta(seconds=horizon)
        # How far each shard has been looked at by age, and by the patrol.
        self._judged: dict[int, int] = {}
        self._patrolled = dict.fromkeys(range(SHARDS), 0)
        self._watched: set[UUID] = set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Work in turns until `stopping` is set."""
        database = await self._open_database()
        try:
            while not stopping.is_set():
                await ENDLESS.run(lambda: self.run_once(database))
                try:
                    await within(stopping.wait(), self._seconds / 4)
                except TimeoutError:
                    continue
        finally:
            await database.close()

    async def run_once(self, database: Database) -> int:
        """One turn; returns how many events were made due again."""
        async with database.transaction() as connection:
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", JANITOR_LOCK):
                return 0
            unsettled = await self._look_at_watched(connection)
            unsettled |= await self._judge(connection)
            unsettled |= await self._patrol(connection)
            self._watched.update(list(unsettled)[: MOST_WATCHED - len(self._watched)])
            found = await connection.fetch(_REPUBLISH, unsettled, self._horizon) if unsettled else ()
        if found:
            emit(PUBLISHER, "RECONCILED", events=len(found))
        return len(found)

    async def _look_at_watched(self, connection: Connection) -> set[UUID]:
        if self._watched:
            self._watched = {row["event_id"] for row in await connection.fetch(_STILL_UNSETTLED, self._watched)}
        return set(self._watched)

    async def _judge(self, connection: Connection) -> set[UUID]:
        if not self._judged:
            end = await connection.fetchval(_END) or 0
            # By time there is a block range index only, which a role's session does without.
            await connection.execute("SET LOCAL enable_bitmapscan = on")
            rows = await connection.fetch(_BEGINNING, self._horizon * REMEMBERED)
            await connection.execute("SET LOCAL enable_bitmapscan = off")
            self._judged = dict.fromkeys(range(SHARDS), end) | {row["shard"]: row["seq"] for row in rows}
        unsettled: set[UUID] = set()
        for _ in range(MOST_PAGES):
            full, found = await self._examine(connection, self._judged)
            unsettled |= found
            if not full:
                break
        return unsettled

    async def _patrol(self, connection: Connection) -> set[UUID]:
        before = dict(self._patrolled)
        _, unsettled = await self._examine(connection, self._patrolled)
        for shard, seq in self._patrolled.items():
            if seq == before[shard]:
                self._patrolled[shard] = 0
        return unsettled

    async def _examine(self, connection: Connection, positions: dict[int, int]) -> tuple[bool, set[UUID]]:
        """Move the positions on by a page; True: there is more. The events among those passed that are not settled."""
        rows = await connection.fetch(_EXAMINE, list(positions), list(positions.values()), PAGE, self._horizon)
        unsettled: set[UUID] = set()
        for row in rows:
            positions[row["shard"]] = row["reached"]
            unsettled.update(row["unsettled"] or ())
        return any(row["rows"] == PAGE for row in rows), unsettled
