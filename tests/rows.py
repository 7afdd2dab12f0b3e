"""A test's database: orders and events written as the program or a stranger writes them, and what became of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple
from uuid import UUID

import asyncpg
import orjson
import pytest_asyncio

from orderflow.audit import audit
from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.engine.ids import new_id
from orderflow.engine.message import Headers, Message
from orderflow.orders import store as orders
from tests.servers import cloned_database
from tests.waiting import eventually


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one_database(migrated_postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """One database for a module whose tests look at rows of their own only: `database_url = one_database` in the module."""
    async with cloned_database(migrated_postgres) as url:
        yield url


class Placed(NamedTuple):
    """An order of the test's and its OrderCreated event."""

    order_id: UUID
    event_id: UUID


async def place(
    connection: asyncpg.Connection, count: int = 1, amount: str = "10.50", trace: str | None = None
) -> list[Placed]:
    """Place orders as the API does, with an event each."""
    headers = json.dumps({"traceparent": trace}) if trace else None
    new = [orders.NewOrder(new_id(), new_id(), uuid.uuid4(), Decimal(amount), headers=headers) for _ in range(count)]
    await orders.place(connection, new)
    return [Placed(order.order_id, order.event_id) for order in new]


async def message_of(connection: asyncpg.Connection, event_id: UUID) -> Message:
    """The event in the outbox, as a relay would fetch it now."""
    row = await connection.fetchrow(
        "SELECT event_id, event_type, aggregate_type, aggregate_id, payload, created_at, attempt, headers FROM outbox"
        " WHERE event_id = $1",
        event_id,
    )
    *fields, headers = row.values()
    return Message(*fields, headers=orjson.loads(headers) if headers else {})


@dataclass(frozen=True)
class Fetched:
    """A Kafka record as the executor takes it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers


async def record_of(connection: asyncpg.Connection, event_id: UUID, offset: int = 0) -> Fetched:
    """The Kafka record that carries the event now."""
    return as_record(await message_of(connection, event_id), offset)


def as_record(message: Message, offset: int = 0) -> Fetched:
    """A message as a fetched record."""
    key, value, headers = message.encode()
    return Fetched("test", 0, offset, key, value, headers)


async def insert_event(
    connection: asyncpg.Connection, aggregate_id: UUID | None = None, kind: str = "Shipped", payload: str = '{"n": 1}'
) -> UUID:
    """Insert an outbox row as any other program would, with plain SQL; returns its event id."""
    return await connection.fetchval(
        "INSERT INTO outbox (event_type, aggregate_type, aggregate_id, payload)"
        " VALUES ($1, 'parcel', $2, $3) RETURNING event_id",
        kind, aggregate_id or uuid.uuid4(), payload,
    )  # fmt: skip


async def order_row(connection: asyncpg.Connection, order_id: UUID) -> tuple[str, int, str | None]:
    """State, version and failure of an order."""
    row = await connection.fetchrow("SELECT state, version, failure FROM orders WHERE id = $1", order_id)
    return tuple(row)


async def states(connection: asyncpg.Connection) -> dict[str, int]:
    """How many orders are in each state."""
    return dict(await connection.fetch("SELECT state, count(*) FROM orders GROUP BY state"))


async def events_of(connection: asyncpg.Connection, order_id: UUID) -> list[str]:
    """The types of an order's events in their order."""
    rows = await connection.fetch("SELECT event_type FROM outbox WHERE aggregate_id = $1 ORDER BY seq", order_id)
    return [row["event_type"] for row in rows]


async def is_processed(connection: asyncpg.Connection, event_id: UUID) -> bool:
    """Whether the event is recorded as processed."""
    return await connection.fetchval("SELECT EXISTS (SELECT FROM processed_events WHERE event_id = $1)", event_id)


async def dead_letter(connection: asyncpg.Connection, event_id: UUID) -> asyncpg.Record | None:
    """The dead letter of an event, with `attempts` parsed by nobody."""
    return await connection.fetchrow("SELECT * FROM dead_letter_events WHERE event_id = $1", event_id)


async def charges_of(connection: asyncpg.Connection, order_id: UUID) -> list[str]:
    """The simulated gateway's entries for an order."""
    rows = await connection.fetch("SELECT status FROM gateway_charges WHERE reference = $1", order_id)
    return [row["status"] for row in rows]


async def set_mode(connection: asyncpg.Connection, mode: str) -> None:
    """Switch the simulated gateway."""
    await connection.execute("UPDATE gateway_control SET mode = $1", mode)


async def all_settled(connection: asyncpg.Connection) -> bool:
    """Whether every order is terminal and every event processed or buried."""
    return await connection.fetchval("""
        SELECT NOT EXISTS (SELECT FROM orders WHERE state IN ('CREATED', 'PAYMENT_PENDING'))
           AND NOT EXISTS (SELECT FROM outbox WHERE published_at IS NULL AND available_at IS DISTINCT FROM 'infinity')
           AND NOT EXISTS (SELECT FROM outbox o LEFT JOIN processed_events p USING (event_id)
                           LEFT JOIN dead_letter_events d USING (event_id)
                           WHERE p.event_id IS NULL AND d.event_id IS NULL)""")


async def settled(connection: asyncpg.Connection, timeout: float = 60.0) -> None:
    """Wait until nothing is left to do."""
    await eventually(lambda: all_settled(connection), timeout, what="every order and event is settled")


async def violations(connection: asyncpg.Connection, accepted: Sequence[UUID] | None = None) -> dict[str, list[str]]:
    """What the audit finds, with horizons of zero: for a database in which nothing is left to do."""
    found = await audit(connection, retry_horizon=0, reconcile_horizon=0, accepted=accepted)
    return {finding.invariant: finding.examples for finding in found if finding.violations}
