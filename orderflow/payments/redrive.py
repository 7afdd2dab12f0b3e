"""Redrive of a dead letter: fresh attempts for the event, and the order's legal way back to work.

A technically FAILED order goes FAILED -> PAYMENT_PENDING; a declined one never does, and an order that is still CREATED or
PAYMENT_PENDING needs no step back.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from orderflow.engine import dead_letters
from orderflow.engine.postgres import Connection
from orderflow.orders import store as orders


@dataclass(frozen=True, slots=True)
class RedriveResult:
    """What a redrive has done."""

    event_id: UUID
    event_type: str
    aggregate_id: UUID
    order_reopened: bool


async def redrive(connection: Connection, event_id: UUID) -> RedriveResult:
    """Redrive one dead letter in a transaction of its own.

    Raises dead_letters.NotRedrivable, and then nothing has changed.
    """
    async with connection.transaction():
        event_type, aggregate_id = await dead_letters.redrive(connection, event_id)
        reopened = event_type == "OrderCreated" and (
            await orders.reopen_if_failed_technically(connection, aggregate_id) is not None
        )
        return RedriveResult(event_id, event_type, aggregate_id, reopened)
