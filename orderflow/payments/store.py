"""SQL of the payment's two transitions: begin and settle, in groups, and FAILED along with a burial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from uuid import UUID

from orderflow.engine.ids import new_id
from orderflow.engine.message import Message
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.processed import Known
from orderflow.engine.seams import seam
from orderflow.orders.model import State

# The common case in one statement: our event, neither processed nor buried nor overtaken, of an order that is CREATED. Rows are
# told by their place in the group: the caller has all their ids.
_BEGIN_IF_FRESH = """
UPDATE orders o SET state = 'PAYMENT_PENDING', version = 2, updated_at = now(), entered_at = o.entered_at || now()
FROM unnest($1::uuid[], $2::uuid[], $3::integer[]) WITH ORDINALITY AS i(event_id, order_id, attempt, place)
     JOIN outbox e ON e.event_id = i.event_id AND e.aggregate_id = i.order_id
     LEFT JOIN processed_events p ON p.event_id = i.event_id
     LEFT JOIN dead_letter_events d ON d.event_id = i.event_id
WHERE o.id = i.order_id AND o.state = 'CREATED' AND o.version = 1
  AND e.event_type = 'OrderCreated' AND e.attempt <= i.attempt AND p.event_id IS NULL AND d.event_id IS NULL
RETURNING i.place, o.user_id, o.amount, e.attempt, e.first_attempt
"""

# Of events that were attempted before, and with them the orders that wait for their payment.
_RESUME = """
SELECT e.event_id, e.event_type, e.aggregate_id, e.attempt, e.first_attempt, p.event_id IS NOT NULL, d.event_id IS NOT NULL,
       o.user_id, o.amount, o.version
FROM outbox e LEFT JOIN processed_events p ON p.event_id = e.event_id
     LEFT JOIN dead_letter_events d ON d.event_id = e.event_id
     LEFT JOIN orders o ON o.id = e.aggregate_id AND o.state = 'PAYMENT_PENDING'
WHERE e.event_id = ANY($1::uuid[])
"""

_BEGIN = """
UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, updated_at = now(), entered_at = entered_at || now()
WHERE id = ANY($1::uuid[]) AND state = 'CREATED' AND version = 1
RETURNING id
"""
_STANDING = "SELECT id, user_id, amount, state, version FROM orders WHERE id = ANY($1::uuid[])"

# The order's row decides: what does not move it is not recorded either, so that of two deliveries at the same moment, or of a
# settlement and a burial, exactly one takes effect. Two deliveries of one order can meet in one group, too (one without its key
# is not held behind the other): an UPDATE takes one of them.
_SETTLE = """
WITH moved AS (
    UPDATE orders o SET state = CASE WHEN i.paid THEN 'PAID' ELSE 'FAILED' END, version = o.version + 1, updated_at = now(),
                        failure = CASE WHEN NOT i.paid THEN 'declined' END, entered_at = o.entered_at || now()
    FROM unnest($1::uuid[], $2::uuid[], $3::integer[], $4::boolean[], $5::uuid[], $6::jsonb[], $7::jsonb[])
         AS i(event_id, order_id, version, paid, new_event_id, payload, headers)
    WHERE o.id = i.order_id AND o.state = 'PAYMENT_PENDING' AND o.version = i.version
    RETURNING i.*),
recorded AS (
    INSERT INTO processed_events (event_id, worker_id) SELECT event_id, $8 FROM moved
    ON CONFLICT (event_id) DO NOTHING),
announced AS (
    INSERT INTO outbox (event_id, event_type, aggregate_type, aggregate_id, payload, headers)
    SELECT new_event_id, CASE WHEN paid THEN 'OrderPaid' ELSE 'OrderFailed' END, 'order', order_id, payload, headers FROM moved)
SELECT CASE WHEN count(*) < cardinality($1) THEN coalesce(array_agg(new_event_id), '{}') END FROM moved
"""

_FAIL = """
UPDATE orders SET state = 'FAILED', version = version + 1, failure = 'error', updated_at = now(),
                  entered_at = entered_at || now()
WHERE id = $1 AND state = ANY($2::text[])
RETURNING version
"""


@dataclass(slots=True)
class Begun:
    """An order on which a charge may begin. `moved`: this call has begun it; if not, another has, and a charge may exist."""

    order_id: UUID
    user_id: UUID
    amount: Decimal
    state: State
    version: int
    moved: bool


@dataclass(slots=True)
class Settlement:
    """How an order ends, PAID or declined; `payload` is the JSON text of the event that tells of it, `since` when its order's
    event was made.
    """

    event_id: UUID
    order_id: UUID
    version: int
    paid: bool
    payload: str
    headers: str | None
    since: datetime

    @property
    def state(self) -> State:
        """The order's, from then on."""
        return State.PAID if self.paid else State.FAILED


@seam
async def begin_if_fresh(database: Database, messages: Sequence[Message]) -> list[Known | None]:
    """What is known of these OrderCreated events; the orders of the fresh ones are CREATED -> PAYMENT_PENDING, and `begun`."""
    rows = await database.fetch(
        _BEGIN_IF_FRESH, [m.id for m in messages], [m.aggregate_id for m in messages], [m.attempt for m in messages]
    )
    results: list[Known | None] = [None] * len(messages)
    for place, user_id, amount, attempt, first_attempt in rows:
        order_id = messages[place - 1].aggregate_id
        begun = Begun(order_id, user_id, amount, State.PAYMENT_PENDING, 2, True)
        results[place - 1] = Known("OrderCreated", order_id, attempt, first_attempt, False, False, begun)
    if left := [message for message, known in zip(messages, results, strict=True) if known is None]:
        others = iter(await resume(database, left))
        results = [known or next(others) for known in results]
    return results


@seam
async def resume(database: Database, messages: Sequence[Message]) -> list[Known | None]:
    """What is known of events that were attempted before; those whose order is PAYMENT_PENDING have it as `begun`."""
    results: dict[UUID, Known] = {}
    for event_id, kind, order_id, attempt, first, processed, buried, user_id, amount, version in await database.fetch(
        _RESUME, [m.id for m in messages]
    ):
        begun = None if version is None else Begun(order_id, user_id, amount, State.PAYMENT_PENDING, version, False)
        results[event_id] = Known(kind, order_id, attempt, first, processed, buried, begun)
    return [results.get(message.id) for message in messages]


@seam
async def begin_if_created(database: Database, order_ids: Sequence[UUID]) -> list[Begun | None]:
    """CREATED -> PAYMENT_PENDING for those that are CREATED; None for an order that does not exist here."""
    moved = {row["id"] for row in await database.fetch(_BEGIN, order_ids)}
    standing = {row["id"]: row for row in await database.fetch(_STANDING, order_ids)}
    results: list[Begun | None] = []
    for order_id in order_ids:
        row = standing.get(order_id)
        # Two deliveries of one order in one group: one of them has moved it.
        results.append(
            Begun(row["id"], row["user_id"], row["amount"], State(row["state"]), row["version"], order_id in moved)
            if row
            else None
        )
        moved.discard(order_id)
    return results


@seam
async def settle_if_pending(database: Database | Connection, settlements: Sequence[Settlement], worker_id: str) -> list[bool]:
    """PAYMENT_PENDING -> PAID or FAILED, the event recorded as processed, and the outcome's event: one statement."""
    new_ids = [new_id() for _ in settlements]
    settled: list[UUID] | None = await database.fetchval(
        _SETTLE,
        [s.event_id for s in settlements],
        [s.order_id for s in settlements],
        [s.version for s in settlements],
        [s.paid for s in settlements],
        new_ids,
        [s.payload for s in settlements],
        [s.headers for s in settlements] if any(s.headers for s in settlements) else None,
        worker_id,
    )
    # Nearly always all of them, and then they are not named.
    if settled is None:
        return [True] * len(settlements)
    found = set(settled)
    return [event_id in found for event_id in new_ids]


@seam
async def fail_if_in(connection: Connection, order_id: UUID, states: Sequence[State]) -> int | None:
    """From one of these states, none of them terminal, to FAILED for a technical reason; the new version, or None."""
    version: int | None = await connection.fetchval(_FAIL, order_id, [state.value for state in states])
    return version


@seam
async def unbury_for_late_charge(connection: Connection, event_id: UUID) -> None:
    """Take the dead letter of an order back whose charge turned out to exist; nothing is published again."""
    await connection.execute("DELETE FROM dead_letter_events WHERE event_id = $1", event_id)
    await connection.execute("UPDATE outbox SET available_at = NULL WHERE event_id = $1 AND published_at IS NOT NULL", event_id)
