"""What the measuring side asks the database: is everything settled yet, and is it sound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from uuid import UUID

import asyncpg

from orderflow import audit
from orderflow.audit import Finding

CONNECT_TIMEOUT = 10.0
COMMAND_TIMEOUT = 120.0

# Through the partial index of the orders in flight: it costs the running program next to nothing.
_ANY_IN_FLIGHT = "SELECT EXISTS (SELECT FROM orders WHERE state IN ('CREATED', 'PAYMENT_PENDING'))"
_IN_FLIGHT = "SELECT count(*) FROM orders WHERE state IN ('CREATED', 'PAYMENT_PENDING')"
# A scan of the whole outbox: asked for after the measuring only.
_UNSETTLED = """
SELECT count(*) FROM outbox o
WHERE (o.published_at IS NULL AND o.available_at IS DISTINCT FROM 'infinity')
   OR NOT (EXISTS (SELECT FROM processed_events p WHERE p.event_id = o.event_id)
           OR EXISTS (SELECT FROM dead_letter_events d WHERE d.event_id = o.event_id))
"""


async def connected(url: str) -> asyncpg.Connection:
    """A connection of the measuring side. Raises OSError, TimeoutError or an asyncpg error."""
    return await asyncpg.connect(
        url, timeout=CONNECT_TIMEOUT, command_timeout=COMMAND_TIMEOUT, server_settings={"application_name": "bench"}
    )


async def until_no_order_in_flight(connection: asyncpg.Connection, *, timeout: float, interval: float = 0.02) -> bool:
    """Wait until every order has ended; False when that took longer than `timeout` seconds."""
    end = time.monotonic() + timeout
    while await connection.fetchval(_ANY_IN_FLIGHT):
        if time.monotonic() >= end:
            return False
        await asyncio.sleep(interval)
    return True


async def unsettled(connection: asyncpg.Connection) -> tuple[int, int]:
    """(orders in flight, events that are not published and then processed or buried)."""
    return int(await connection.fetchval(_IN_FLIGHT)), int(await connection.fetchval(_UNSETTLED))


async def until_settled(
    connection: asyncpg.Connection, *, timeout: float, tell: Callable[[int, int], None] = lambda orders, events: None
) -> bool:
    """Wait until every order has ended and every event is consumed; False after `timeout` seconds.

    `tell` hears how many are left.
    """
    end = time.monotonic() + timeout
    while True:
        orders, events = await unsettled(connection)
        tell(orders, events)
        if not orders and not events:
            return True
        if time.monotonic() >= end:
            return False
        await asyncio.sleep(0.25)


async def audited(connection: asyncpg.Connection, accepted: Iterable[UUID]) -> list[Finding]:
    """The audit of a database in which nothing is under way any more: nothing is excused by being young."""
    return await audit.audit(connection, retry_horizon=0.0, reconcile_horizon=0.0, accepted=accepted, timeout=COMMAND_TIMEOUT)
