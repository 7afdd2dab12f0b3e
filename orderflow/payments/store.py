"""SQL of the payment's two transitions: begin and settle, in groups, and FAILED along with a burial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from uuid import UUID

from orderflow.engine.ids import new_id
from orderflow.engine.postgres import Connection, Database
from orderflow.orders.model import State

_BEGIN = """
WITH input AS (SELECT DISTINCT id FROM unnest($1::uuid[]) AS t(id)),
moved AS (
    UPDATE orders o SET state = 'PAYMENT_PENDING', version = o.version + 1, updated_at = now(),
                        entered_at = o.entered_at || now()
    FROM input i WHERE o.id = i.id AND o.state = 'CREATED' AND o.version = 1
    RETURNING o.id)
SELECT o.id, o.state, o.version, o.amount, o.user_id, m.id IS NOT NULL AS moved
FROM input i JOIN orders o ON o.id = i.id LEFT JOIN moved m ON m.id = o.id
"""

# The order's row decides: what does not move it is not recorded either, so that of two deliveries at the same moment, or of a
# settlement and a burial, exactly one takes effect. Two deliveries of one order can meet in one group, too: one without its key
# is not held behind the other.
_SETTLE = """
WITH input AS (
    SELECT DISTINCT ON (order_id) *
    FROM unnest($1::uuid[], $2::uuid[], $3::integer[], $4::text[], $5::text[], $6::uuid[], $7::text[], $8::jsonb[], $9::jsonb[])
                  AS t(event_id, order_id, version, state, failure, new_event_id, new_event_type, payload, headers)),
moved AS (
    UPDATE orders o SET state = i.state, version = o.version + 1, failure = i.failure, updated_at = now(),
                        entered_at = o.entered_at || now()
    FROM input i WHERE o.id = i.order_id AND o.state = 'PAYMENT_PENDING' AND o.version = i.version
    RETURNING o.id),
recorded AS (
    INSERT INTO processed_events (event_id, worker_id)
    SELECT i.event_id, $10 FROM input i JOIN moved m ON m.id = i.order_id
    ON CONFLICT (event_id) DO NOTHING),
announced AS (
    INSERT INTO outbox (event_id, event_type, aggregate_type, aggregate_id, payload, headers)
    SELECT i.new_event_id, i.new_event_type, 'order', i.order_id, i.payload, i.headers
    FROM input i JOIN moved m ON m.id = i.order_id)
SELECT i.new_event_id FROM input i JOIN moved m ON m.id = i.order_id
"""

_FAIL = """
UPDATE orders SET state = 'FAILED', version = version + 1, failure = 'error', updated_at = now(),
                  entered_at = entered_at || now()
WHERE id = $1 AND state IN ('CREATED', 'PAYMENT_PENDING')
RETURNING version
"""


@dataclass(frozen=True, slots=True)
class Begun:
    """An order on which a charge may begin. `resumed`: another delivery has begun one before, and it may exist."""

    order_id: UUID
    user_id: UUID
    amount: Decimal
    state: State
    version: int
    moved: bool


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an order ends: `state` PAID or FAILED; `payload` is the JSON text of the event that tells of it."""

    event_id: UUID
    order_id: UUID
    version: int
    state: State
    failure: str | None
    event_type: str
    payload: str
    headers: str | None


async def begin_if_created(database: Database, order_ids: Sequence[UUID]) -> list[Begun | None]:
    """CREATED -> PAYMENT_PENDING for those that are CREATED; None for an order that does not exist here."""
    rows = await database.fetch(_BEGIN, order_ids)
    begun = {}
    for row in rows:
        moved = row["moved"]
        # The select reads from before the update; a row that another worker moved meanwhile shows as CREATED and not moved.
        state = State.PAYMENT_PENDING if row["state"] == State.CREATED else State(row["state"])
        version = 2 if row["state"] == State.CREATED else row["version"]
        begun[row["id"]] = Begun(row["id"], row["user_id"], row["amount"], state, version, moved)
    moved_once: set[UUID] = set()
    results = []
    for order_id in order_ids:
        found = begun.get(order_id)
        if found is not None and found.moved:
            # Two deliveries of one order in one group: one of them has moved it.
            if order_id in moved_once:
                found = replace(found, moved=False)
            moved_once.add(order_id)
        results.append(found)
    return results


async def settle_if_pending(database: Database | Connection, settlements: Sequence[Settlement], worker_id: str) -> list[bool]:
    """PAYMENT_PENDING -> PAID or FAILED, the event recorded as processed, and the outcome's event: one statement."""
    new_ids = [new_id() for _ in settlements]
    rows = await database.fetch(
        _SETTLE,
        [s.event_id for s in settlements],
        [s.order_id for s in settlements],
        [s.version for s in settlements],
        [s.state.value for s in settlements],
        [s.failure for s in settlements],
        new_ids,
        [s.event_type for s in settlements],
        [s.payload for s in settlements],
        [s.headers for s in settlements],
        worker_id,
    )
    announced = {row["new_event_id"] for row in rows}
    return [event_id in announced for event_id in new_ids]


async def fail_if_not_terminal(connection: Connection, order_id: UUID) -> int | None:
    """CREATED or PAYMENT_PENDING -> FAILED for a technical reason; the new version, or None when nothing was to be done."""
    version: int | None = await connection.fetchval(_FAIL, order_id)
    return version


async def unbury_for_late_charge(connection: Connection, event_id: UUID) -> None:
    """Take the dead letter of an order back whose charge turned out to exist; nothing is published again."""
    await connection.execute("DELETE FROM dead_letter_events WHERE event_id = $1", event_id)
    await connection.execute("UPDATE outbox SET available_at = NULL WHERE event_id = $1 AND published_at IS NOT NULL", event_id)
