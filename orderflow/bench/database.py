"""What the measuring side asks the database: is everything settled yet, and is it sound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from orderflow import audit
from orderflow.audit import Finding

CONNECT_TIMEOUT = 10.0
COMMAND_TIMEOUT = 120.0
# Of each invariant: ten million orders take their time.
AUDIT_TIMEOUT = 900.0
# A horizon past every run, in seconds.
LONG = 86_400.0
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)

# Through the partial index of the orders in flight: it costs the running program next to nothing.
_ANY_IN_FLIGHT = "SELECT EXISTS (SELECT FROM orders WHERE in_flight)"
_IN_FLIGHT = "SELECT count(*) FROM orders WHERE in_flight"
# A scan of all that came since $1: asked for after the measuring only.
_UNSETTLED = """
SELECT count(*) FROM outbox o
WHERE o.created_at >= $1 AND ((o.published_at IS NULL AND o.available_at IS DISTINCT FROM 'infinity')
   OR NOT (EXISTS (SELECT FROM processed_events p WHERE p.event_id = o.event_id)
           OR EXISTS (SELECT FROM dead_letter_events d WHERE d.event_id = o.event_id)))
"""
_OTHERS = """
SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'
                                              AND pid <> pg_backend_pid())
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


async def unsettled(connection: asyncpg.Connection, since: datetime = LONG_AGO) -> tuple[int, int]:
    """(orders in flight, events written since then that are not published and then processed or buried)."""
    return int(await connection.fetchval(_IN_FLIGHT)), int(await connection.fetchval(_UNSETTLED, since))


async def until_settled(
    connection: asyncpg.Connection, *, timeout: float, tell: Callable[[int, int], None] = lambda orders, events: None,
    since: datetime = LONG_AGO,
) -> bool:  # fmt: skip
    """Wait until every order has ended and every event written since then is consumed; False after `timeout` seconds.

    `tell` hears how many are left.
    """
    end = time.monotonic() + timeout
    while True:
        orders, events = await unsettled(connection, since)
        tell(orders, events)
        if not orders and not events:
            return True
        if time.monotonic() >= end:
            return False
        await asyncio.sleep(0.25)


async def until_alone(connection: asyncpg.Connection, *, timeout: float = CONNECT_TIMEOUT) -> None:
    """Wait until nobody else is connected to this database, which is when PostgreSQL has counted all that was done.

    Raises TimeoutError.
    """
    end = time.monotonic() + timeout
    while await connection.fetchval(_OTHERS):
        if time.monotonic() >= end:
            raise TimeoutError(f"somebody was still connected after {timeout:.0f} s")
        await asyncio.sleep(0.02)


async def audited(connection: asyncpg.Connection, accepted: Iterable[UUID], *, horizon: float = 0.0) -> list[Finding]:
    """The audit of a database in which nothing is under way any more: nothing is excused by being young.

    A `horizon` in seconds is for a run in which nobody was there to publish or to consume.
    """
    return await audit.audit(
        connection, retry_horizon=horizon, reconcile_horizon=horizon, accepted=accepted, timeout=AUDIT_TIMEOUT
    )
