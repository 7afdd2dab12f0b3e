"""Admission by the age of the backlog: an API that accepts what nobody works off only tells of the outage later.

Kafka, the workers or the gateway being away for a while is no reason to refuse orders, since to keep them meanwhile is what the
outbox is for. But the oldest order that waits, its payment not begun, must not wait longer and longer. What is asked is asked
in the background, once a second; a request pays for a look at a flag.
"""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta
from typing import Final

import asyncpg

from orderflow.engine.patience import is_transient
from orderflow.engine.postgres import Database
from orderflow.engine.seams import seam
from orderflow.engine.telemetry import API, emit
from orderflow.orders import store

EVERY_SECONDS: Final = 1.0
# Of the limit: below this share of it, orders are accepted again.
ENOUGH: Final = 0.9
# Orders that one look takes in. Of those whose event will never come, so many are passed over a second.
PAGE: Final = 200


class Admission:
    """`refusing`: no new order is accepted, because the oldest has waited `age` seconds. `limit` in seconds; 0: never."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.refusing = False
        self.age = 0.0
        # Whether an order was placed here since the last look: an idle process asks nothing, and nor does it refuse.
        self.news = True
        self._since = 0.0
        # No CREATED order that waits is older. It never goes back: an order that becomes visible late is not waited for.
        self._after: datetime | None = None

    async def run(self, database: Database) -> None:
        """Look once a second while there is something to see, until cancelled."""
        while True:
            if self._limit and (self.news or self.age):
                try:
                    await self.run_once(database)
                except Exception as error:
                    # Without PostgreSQL no order is accepted anyway, and what it refuses here it refuses to each request.
                    if not is_transient(error) and not isinstance(error, asyncpg.PostgresError):
                        raise
                    self.news = True
            await asyncio.sleep(EVERY_SECONDS)

    @seam
    async def run_once(self, database: Database) -> None:
        """One look, and the decision that follows from it."""
        before, self.news = self.age, False
        found = await store.oldest_created(database, self._after, timedelta(seconds=2 * self._limit), PAGE)
        if found.oldest is not None:
            self._after = found.oldest
            self.age = (found.now - found.oldest).total_seconds()
        elif found.seen == PAGE and found.last is not None:
            # None of these will ever be worked on; who waits stands behind them.
            self._after = found.last + timedelta(microseconds=1)
        else:
            self._after, self.age = found.now, 0.0
        if self.age != before:
            emit(API, "BACKLOG_SEEN", seconds=self.age)
        if not self.refusing and self.age > self._limit:
            self.refusing, self._since = True, time.monotonic()
            emit(API, "ORDERS_REFUSED", oldestSeconds=round(self.age, 1), limitSeconds=self._limit)
        elif self.refusing and self.age <= self._limit * ENOUGH:
            self.refusing = False
            emit(API, "ORDERS_ACCEPTED", refusedSeconds=round(time.monotonic() - self._since, 1))
