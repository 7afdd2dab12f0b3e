"""The janitor: finds events that were published and yet never settled, and publishes them again.

Kafka may lose what it acknowledged (a wiped disk, a broker of `dev` that forgets), and a worker may die between its fetch
and its settlement while its offsets move on. The outbox row is what brings the event, and so its order, to an end.

What still waits in Kafka for its consumer is not lost, and left alone (`consumed`): only what the group has passed by.

Every event is looked at once, when it has become old enough. One that is not settled then is watched until it is. And a patrol
goes round the whole table, some rows a turn, for what neither can know of: what an earlier janitor watched, an old event that
came back by a redrive, a row with a creation time of its own. What a turn costs does not grow with the table. It is done in
pages, each of which stays done: a janitor that is killed in the midst of a long turn has not worked in vain.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from orderflow.engine.outbox import SHARDS
from orderflow.engine.patience import ENDLESS, within
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.seams import seam
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

_OVERDUE = """
SELECT array_agg(event_id) FROM outbox
WHERE event_id = ANY($1::uuid[]) AND published_at < now() - $2::interval AND available_at IS DISTINCT FROM 'infinity'
"""

# The guard is repeated: between the two statements a row may have been republished, or buried.
_REPUBLISH = """
UPDATE outbox SET published_at = NULL, available_at = now()
WHERE event_id = ANY($1::uuid[]) AND published_at < least(now(), $3) - $2::interval AND available_at IS DISTINCT FROM 'infinity'
RETURNING event_id
"""


class _AnotherWorks(Exception):
    """The lock is another janitor's."""


class Janitor:
    """Reconciles every `horizon` / 4 seconds what was published longer than `horizon` seconds ago and is not settled."""

    name = "janitor"

    def __init__(
        self, open_database: Callable[[], Awaitable[Database]], consumed_until: Callable[[], Awaitable[datetime]], *,
        horizon: float = 60.0, patrol_from: int | None = None,
    ) -> None:  # fmt: skip
        """`consumed_until`: see `consumed`; asked once a turn, and only when something is to be published again.

        `patrol_from`: the number in the outbox behind which the patrol begins; by default anywhere.
        """
        self._open_database = open_database
        self._consumed_until = consumed_until
        self._seconds = horizon
        self._horizon = timedelta(seconds=horizon)
        self._patrol_from = patrol_from
        # How far each shard has been looked at by age, and by the patrol.
        self._judged: dict[int, int] = {}
        self._patrolled: dict[int, int] = {}
        self._watched: set[UUID] = set()
        # How far the group has come, as this turn was told.
        self._consumed: datetime | None = None

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

    @seam
    async def run_once(self, database: Database) -> int:
        """One turn, each page in a transaction of its own; returns how many events were made due again."""
        found = 0
        self._consumed = None
        try:
            if not self._judged:
                await self._begin(database)
            watched = list(self._watched)
            for begin in range(0, len(watched), PAGE * SHARDS):
                found += await self._look_again(database, watched[begin : begin + PAGE * SHARDS])
            for _ in range(MOST_PAGES):
                more, count = await self._examine(database, self._judged)
                found += count
                if not more:
                    break
            found += await self._patrol(database)
        except _AnotherWorks:
            pass
        return found

    @contextlib.asynccontextmanager
    async def _alone(self, database: Database) -> AsyncIterator[Connection]:
        async with database.transaction() as connection:
            await self._lock(connection)
            yield connection

    @seam
    async def _lock(self, connection: Connection) -> None:
        if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", JANITOR_LOCK):
            raise _AnotherWorks

    @seam
    async def _begin(self, database: Database) -> None:
        async with self._alone(database) as connection:
            end = await connection.fetchval(_END) or 0
            # By time there is a block range index only, which a role's session does without.
            await connection.execute("SET LOCAL enable_bitmapscan = on")
            rows = await connection.fetch(_BEGINNING, self._horizon * REMEMBERED)
        # Anywhere: a patrol that began at the first row with every start would seldom come to the last one of a large table.
        first = random.randint(0, end) if self._patrol_from is None else self._patrol_from
        self._patrolled = dict.fromkeys(range(SHARDS), first)
        self._judged = dict.fromkeys(range(SHARDS), end) | {row["shard"]: row["seq"] for row in rows}

    @seam
    async def _look_again(self, database: Database, known: Sequence[UUID]) -> int:
        """Which of the watched events are settled now; returns how many of the others were published again."""
        async with self._alone(database) as connection:
            unsettled = [row["event_id"] for row in await connection.fetch(_STILL_UNSETTLED, known)]
            count = await self._publish_again(connection, unsettled)
        self._watched.difference_update(set(known).difference(unsettled))
        return _told(count)

    @seam
    async def _examine(self, database: Database, positions: dict[int, int]) -> tuple[bool, int]:
        """Move the positions on by a page; True: there is more. And how many of it were published again."""
        async with self._alone(database) as connection:
            rows = await connection.fetch(_EXAMINE, list(positions), list(positions.values()), PAGE, self._horizon)
            unsettled = [event_id for row in rows for event_id in row["unsettled"] or ()]
            count = await self._publish_again(connection, unsettled)
        # Behind the commit: what a lost connection has undone is looked at again.
        positions.update({row["shard"]: row["reached"] for row in rows})
        self._watched.update(unsettled[: MOST_WATCHED - len(self._watched)])
        return any(row["rows"] == PAGE for row in rows), _told(count)

    async def _patrol(self, database: Database) -> int:
        before = dict(self._patrolled)
        _, count = await self._examine(database, self._patrolled)
        for shard, seq in self._patrolled.items():
            if seq == before[shard]:
                self._patrolled[shard] = 0
        return count

    @seam
    async def _publish_again(self, connection: Connection, unsettled: Sequence[UUID]) -> int:
        lost = await connection.fetchval(_OVERDUE, unsettled, self._horizon) if unsettled else None
        if not lost:
            return 0
        if self._consumed is None:
            self._consumed = await self._consumed_until()
        return len(await connection.fetch(_REPUBLISH, lost, self._horizon, self._consumed))


def _told(events: int) -> int:
    if events:
        emit(PUBLISHER, "RECONCILED", events=events)
    return events
