"""The janitor: finds events that were published and yet never settled, and publishes them again.

Kafka may lose what it acknowledged (a wiped disk, a broker of `dev` that forgets), and a worker may die between its fetch
and its settlement while its offsets move on. The outbox row is what brings the event, and so its order, to an end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from orderflow.engine import outbox
from orderflow.engine.patience import ENDLESS, within
from orderflow.engine.postgres import Database
from orderflow.engine.telemetry import PUBLISHER, emit

# One process at a time; the others' turns end at once.
JANITOR_LOCK = 0x6F66_0003_0000_0000
LIMIT = 1000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Every so many turns all rows are looked at: an old event can come back by a redrive, and a row can become visible late, or
# carry a creation time of its own.
FULL_EVERY = 20


class Janitor:
    """Reconciles every `horizon` / 4 seconds what was published longer than `horizon` seconds ago and is not settled."""

    name = "janitor"

    def __init__(self, open_database: Callable[[], Awaitable[Database]], *, horizon: float = 60.0) -> None:
        self._open_database = open_database
        self._horizon = horizon
        self._settled_before = EPOCH
        self._turns = 0

    async def run(self, stopping: asyncio.Event) -> None:
        """Work in turns until `stopping` is set."""
        database = await self._open_database()
        try:
            while not stopping.is_set():
                await ENDLESS.run(lambda: self.run_once(database))
                try:
                    await within(stopping.wait(), self._horizon / 4)
                except TimeoutError:
                    continue
        finally:
            await database.close()

    async def run_once(self, database: Database) -> int:
        """One turn; returns how many events were made due again."""
        async with database.transaction() as connection:
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", JANITOR_LOCK):
                return 0
            if self._turns % FULL_EVERY == 0:
                self._settled_before = EPOCH
            self._turns += 1
            begun = await connection.fetchval("SELECT now()")
            found = await outbox.republish_unsettled(
                connection, since=self._settled_before, published_before=timedelta(seconds=self._horizon), limit=LIMIT
            )
            if not found:
                # Everything older is settled: the next turn looks only at what came since, so that its cost does not grow.
                oldest = await connection.fetchval(OLDEST_UNSETTLED, self._settled_before)
                self._settled_before = oldest or begun - timedelta(seconds=self._horizon)
        if found:
            emit(PUBLISHER, "RECONCILED", events=len(found))
        return len(found)


OLDEST_UNSETTLED = """
SELECT min(o.created_at) FROM outbox o
WHERE o.created_at >= $1
  AND NOT EXISTS (SELECT FROM processed_events p WHERE p.event_id = o.event_id)
  AND NOT EXISTS (SELECT FROM dead_letter_events d WHERE d.event_id = o.event_id)
"""
