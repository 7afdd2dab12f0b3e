"""SQL of the orders table: placing in groups, reading, and each guarded transition that needs no other room's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from uuid import UUID

import asyncpg
import orjson

from orderflow.engine.message import Message
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.seams import seam
from orderflow.orders.model import State

_PLACE = """
WITH input AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::numeric[], $4::uuid[], $5::jsonb[])
                  AS t(order_id, user_id, amount, event_id, headers)),
announced AS (
    INSERT INTO outbox (event_id, event_type, aggregate_type, aggregate_id, payload, headers)
    SELECT event_id, 'OrderCreated', 'order', order_id,
           jsonb_build_object('orderId', order_id, 'userId', user_id, 'amount', amount::numeric(12,2)::text), headers
    FROM input),
placed AS (
    INSERT INTO orders (id, user_id, amount) SELECT order_id, user_id, amount FROM input)
SELECT now()
"""

# ON CONFLICT DO NOTHING throughout: after a lost connection the same rows are sent again, and whether the first commit
# happened shows in what is there (see `_resolve`). Keys are claimed in order, so that two processes that place overlapping
# keys wait for each other in one direction only.
_PLACE_CAREFULLY = """
WITH input AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::numeric[], $4::uuid[], $5::jsonb[], $6::text[], $7::bytea[])
                  AS t(order_id, user_id, amount, event_id, headers, key, request_hash)),
claimed AS (
    INSERT INTO idempotency_keys AS k (key, request_hash, order_id)
    SELECT key, request_hash, order_id FROM input WHERE key IS NOT NULL ORDER BY key
    ON CONFLICT (key) DO UPDATE SET request_hash = excluded.request_hash, order_id = excluded.order_id, created_at = now()
        WHERE k.created_at < now() - interval '24 hours'
    RETURNING k.order_id),
accepted AS (
    SELECT * FROM input WHERE key IS NULL OR order_id IN (SELECT order_id FROM claimed)),
announced AS (
    INSERT INTO outbox (event_id, event_type, aggregate_type, aggregate_id, payload, headers)
    SELECT event_id, 'OrderCreated', 'order', order_id,
           jsonb_build_object('orderId', order_id, 'userId', user_id, 'amount', amount::numeric(12,2)::text), headers
    FROM accepted
    ON CONFLICT (event_id) DO NOTHING)
INSERT INTO orders (id, user_id, amount) SELECT order_id, user_id, amount FROM accepted
ON CONFLICT (id) DO NOTHING RETURNING id, created_at
"""

_RESOLVE = """
SELECT t.order_id AS asked, o.id, o.user_id, o.amount, o.created_at, k.request_hash
FROM unnest($1::uuid[], $2::text[]) AS t(order_id, key)
LEFT JOIN idempotency_keys k ON k.key = t.key
LEFT JOIN orders o ON o.id = coalesce(k.order_id, t.order_id)
"""

_EARLIER = """
SELECT k.key, k.request_hash, o.id, o.user_id, o.amount, o.created_at
FROM idempotency_keys k JOIN orders o ON o.id = k.order_id
WHERE k.key = ANY($1::text[]) AND k.created_at >= now() - interval '24 hours'
"""

# The oldest CREATED orders, and which of them still wait for their event: none does whose event is processed, buried, or was
# never written. From a time on, up to which nothing was left: at the old end of the index lie the entries of all that was
# settled lately.
_OLDEST_CREATED = """
SELECT now() AS now, count(*) AS seen, max(c.created_at) AS last, min(c.created_at) FILTER (WHERE e.waits) AS oldest
FROM (SELECT id, created_at FROM orders WHERE in_flight AND created_at >= coalesce($1, now() - $2::interval)
        AND state = 'CREATED' ORDER BY created_at, id LIMIT $3) AS c
LEFT JOIN LATERAL (
    SELECT true AS waits FROM outbox o LEFT JOIN processed_events p ON p.event_id = o.event_id
    WHERE o.aggregate_id = c.id AND o.event_type = 'OrderCreated' AND o.available_at IS DISTINCT FROM 'infinity'
      AND p.event_id IS NULL LIMIT 1) AS e ON true
"""

_COLUMNS = "id, user_id, state, version, amount, failure, created_at, updated_at, entered_at, retired_at"


@dataclass(slots=True)
class NewOrder:
    """An order to be placed. `key` and `request_hash` are both None, or both given."""

    order_id: UUID
    event_id: UUID
    user_id: UUID
    amount: Decimal
    key: str | None = None
    request_hash: bytes | None = None
    headers: str | None = None


@dataclass(slots=True)
class Placed:
    """The order is durable. `replayed`: an earlier request with the same key and body has placed it."""

    order_id: UUID
    user_id: UUID
    amount: Decimal
    created_at: datetime
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class KeyReused:
    """The idempotency key belongs to a request with another body; nothing was written."""


@dataclass(frozen=True, slots=True)
class Order:
    """A row of orders; `entered_at[v - 1]` is when version v began, `retired_at` when retention deleted its events."""

    id: UUID
    user_id: UUID
    state: State
    version: int
    amount: Decimal
    failure: str | None
    created_at: datetime
    updated_at: datetime
    entered_at: list[datetime]
    retired_at: datetime | None = None


@seam
async def place(connection: Database | Connection, orders: Sequence[NewOrder]) -> list[Placed | KeyReused]:
    """Write orders, their OrderCreated events and their idempotency keys in one statement; safe to repeat."""
    columns = (
        [o.order_id for o in orders],
        [o.user_id for o in orders],
        [o.amount for o in orders],
        [o.event_id for o in orders],
        [o.headers for o in orders],
    )
    if all(o.key is None for o in orders):
        try:
            now = await connection.fetchval(_PLACE, *columns)
            return [Placed(o.order_id, o.user_id, o.amount, now) for o in orders]
        except asyncpg.UniqueViolationError:
            # Sent again after a lost answer: the first commit had happened.
            pass
    rows = await connection.fetch(_PLACE_CAREFULLY, *columns, [o.key for o in orders], [o.request_hash for o in orders])
    placed = {row["id"]: row["created_at"] for row in rows}
    left = [o for o in orders if o.order_id not in placed]
    earlier = await _resolve(connection, left) if left else {}
    return [
        Placed(o.order_id, o.user_id, o.amount, placed[o.order_id]) if o.order_id in placed else earlier[o.order_id]
        for o in orders
    ]


@seam
async def earlier(database: Database, keys: Sequence[tuple[str, bytes]]) -> list[Placed | KeyReused | None]:
    """What was placed with each of these keys, given with its request's hash; None for a key that is free."""
    rows = {row["key"]: row for row in await database.fetch(_EARLIER, [key for key, _ in keys])}
    results: list[Placed | KeyReused | None] = []
    for key, hashed in keys:
        row = rows.get(key)
        if row is None:
            results.append(None)
        elif row["request_hash"] != hashed:
            results.append(KeyReused())
        else:
            results.append(Placed(row["id"], row["user_id"], row["amount"], row["created_at"], replayed=True))
    return results


@dataclass(frozen=True, slots=True)
class Oldest:
    """The oldest CREATED orders from some time on. `seen`: how many were looked at, up to `last`; `oldest`: the first of them
    that waits for its event, if one does.
    """

    now: datetime
    seen: int
    last: datetime | None
    oldest: datetime | None


@seam
async def oldest_created(database: Database, after: datetime | None, within: timedelta, most: int) -> Oldest:
    """Look at no more than `most` CREATED orders, from `after` on; without it, at those of this length of time."""
    row = await database.fetchrow(_OLDEST_CREATED, after, within, most)
    assert row is not None
    return Oldest(**row)


def announced(orders: Sequence[NewOrder], results: Sequence[Placed | KeyReused]) -> list[Message]:
    """The OrderCreated events of those that `place` has written: what the outbox has for them, byte for byte."""
    return [
        Message(
            order.event_id, "OrderCreated", "order", order.order_id,
            f'{{"amount": "{order.amount:.2f}", "userId": "{order.user_id}", "orderId": "{order.order_id}"}}',
            placed.created_at, headers=orjson.loads(order.headers) if order.headers else {},
        )
        for order, placed in zip(orders, results, strict=True)
        if isinstance(placed, Placed) and not placed.replayed
    ]  # fmt: skip


@seam
async def _resolve(connection: Database | Connection, orders: Sequence[NewOrder]) -> dict[UUID, Placed | KeyReused]:
    rows = await connection.fetch(_RESOLVE, [o.order_id for o in orders], [o.key for o in orders])
    asked = {o.order_id: o for o in orders}
    results: dict[UUID, Placed | KeyReused] = {}
    for row in rows:
        order = asked[row["asked"]]
        if row["request_hash"] is not None and row["request_hash"] != order.request_hash:
            results[order.order_id] = KeyReused()
        elif row["id"] is None:
            # The claim we lost to was rolled back, or expired between the two statements: the whole group is tried again.
            raise asyncpg.SerializationError("an idempotency key was released while it was read")
        else:
            results[order.order_id] = Placed(
                row["id"], row["user_id"], row["amount"], row["created_at"], replayed=row["id"] != order.order_id
            )
    return results


def _order(row: asyncpg.Record) -> Order:
    return Order(**{**dict(row), "state": State(row["state"])})


@seam
async def get(database: Database, order_id: UUID) -> Order | None:
    """One order, or None."""
    row = await database.fetchrow(f"SELECT {_COLUMNS} FROM orders WHERE id = $1", order_id)
    return _order(row) if row else None


@seam
async def newest(database: Database, *, state: State | None, limit: int, after: tuple[datetime, UUID] | None) -> list[Order]:
    """Orders, newest first, that come after the keyset cursor `(created_at, id)`."""
    # Conditions that are not asked for are left out, and the state stands in the text: under `$1 IS NULL OR ...` a generic plan
    # can use neither the keyset (a deep page would read all pages before it) nor the partial index of the orders in flight.
    conditions = [f"state = '{state.value}'"] if state else []
    if state in (State.CREATED, State.PAYMENT_PENDING):
        conditions.append("in_flight")
    if after:
        conditions.append("(created_at, id) < ($2, $3)")
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    rows = await database.fetch(
        f"SELECT {_COLUMNS} FROM orders {where} ORDER BY created_at DESC, id DESC LIMIT $1", limit, *(after or ())
    )
    return [_order(row) for row in rows]


@seam
async def timeline(database: Database, order_id: UUID) -> list[asyncpg.Record]:
    """The order's events, oldest first, each with when it was published, processed or buried, and its failed attempts."""
    return await database.fetch(
        """
        SELECT o.event_id, o.event_type, o.payload, o.created_at, o.published_at, p.processed_at, p.worker_id, o.attempt,
               o.failures, d.failed_at AS buried_at, d.reason
        FROM outbox o LEFT JOIN processed_events p USING (event_id) LEFT JOIN dead_letter_events d USING (event_id)
        WHERE o.aggregate_id = $1 ORDER BY o.seq
        """,
        order_id,
    )


@seam
async def reopen_if_failed_technically(connection: Connection, order_id: UUID) -> int | None:
    """FAILED by an error -> PAYMENT_PENDING, for a redrive; the new version, or None: a declined order stays as it is."""
    version: int | None = await connection.fetchval(
        """
        UPDATE orders SET state = 'PAYMENT_PENDING', version = version + 1, failure = NULL,
                          updated_at = now(), entered_at = entered_at || now()
        WHERE id = $1 AND state = 'FAILED' AND failure = 'error' RETURNING version
        """,
        order_id,
    )
    return version
