"""A test's history: orders that went all their way long ago, by backdating what the program's own parts have written."""

from __future__ import annotations

from datetime import timedelta

import asyncpg

from orderflow.payments.simulated import SimulatedGateway
from tests.pipeline import executing, opened
from tests.rows import Placed, place, record_of, set_mode

_BACKDATE = """
UPDATE outbox SET created_at = created_at - '{0}'::interval, published_at = published_at - '{0}'::interval;
UPDATE orders SET created_at = created_at - '{0}'::interval, updated_at = updated_at - '{0}'::interval,
                  entered_at = ARRAY(SELECT t - '{0}'::interval FROM unnest(entered_at) AS t);
UPDATE processed_events SET processed_at = processed_at - '{0}'::interval;
UPDATE dead_letter_events SET failed_at = failed_at - '{0}'::interval, discarded_at = discarded_at - '{0}'::interval;
UPDATE gateway_charges SET created_at = created_at - '{0}'::interval;
UPDATE idempotency_keys SET created_at = created_at - '{0}'::interval;
"""


async def finished(connection: asyncpg.Connection, url: str, count: int = 1, mode: str = "succeed") -> list[Placed]:
    """Orders that the gateway in that mode has brought to their end, all events published and delivered or buried."""
    await set_mode(connection, mode)
    placed = await place(connection, count)
    async with opened(url) as ledger, executing(url, SimulatedGateway(ledger, delay=0.0)) as executor:
        while waiting := await connection.fetch(
            "SELECT event_id FROM outbox o WHERE available_at IS DISTINCT FROM 'infinity'"
            " AND NOT EXISTS (SELECT FROM processed_events p WHERE p.event_id = o.event_id) ORDER BY seq"
        ):
            for row in waiting:
                await executor.execute(await record_of(connection, row["event_id"]))
    await connection.execute("UPDATE outbox SET published_at = now(), available_at = NULL WHERE published_at IS NULL")
    await set_mode(connection, "random")
    return placed


async def backdate(connection: asyncpg.Connection, days: float = 40.0) -> None:
    """Let that much time have passed since everything that is there."""
    await connection.execute(_BACKDATE.format(f"{timedelta(days=days).total_seconds()} s"))
