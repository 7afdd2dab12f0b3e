"""Dead letters: bury, list, redrive, discard.

A buried event's outbox row is put out of every relay's reach (`available_at = 'infinity'`); a redrive brings it back with
fresh attempts and deletes the dead letter; a discard keeps the dead letter, with the reason, for good.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

import orjson

from orderflow.engine import held
from orderflow.engine.handling import Record
from orderflow.engine.message import Message
from orderflow.engine.outbox import CHANNEL, Failure, storable
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.seams import seam

# The guards: never bury what has been processed, nor what another delivery has already moved to a later attempt.
_BURY_ROW_IF_ATTEMPT = """
UPDATE outbox o
SET available_at = 'infinity', published_at = coalesce(published_at, CASE WHEN $4 THEN now() END),
    failures = CASE WHEN $3::jsonb IS NULL THEN failures ELSE coalesce(failures, '[]') || $3::jsonb END
WHERE event_id = $1 AND attempt = $2 AND available_at IS DISTINCT FROM 'infinity'
  AND NOT EXISTS (SELECT FROM processed_events p WHERE p.event_id = $1)
RETURNING failures, payload
"""

_INSERT = """
INSERT INTO dead_letter_events (event_id, event_type, aggregate_id, payload, reason, error_class, error_message, attempts,
                                headers, topic, partition, "offset", worker_id)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
ON CONFLICT (event_id) DO NOTHING
RETURNING event_id
"""

_BURY_FOREIGN = """
INSERT INTO dead_letter_events (event_id, event_type, aggregate_id, payload, reason, error_class, error_message, headers,
                                topic, partition, "offset", raw, worker_id)
SELECT r.*, $13 FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::jsonb[], $5::text[], $6::text[], $7::text[], $8::jsonb[],
                            $9::text[], $10::integer[], $11::bigint[], $12::bytea[]) AS r
ON CONFLICT (event_id) DO NOTHING
RETURNING event_id
"""

_UNBURY = """
UPDATE outbox SET published_at = NULL, available_at = now(), attempt = attempt + 1, first_attempt = attempt + 1
WHERE event_id = $1
RETURNING event_type, aggregate_id
"""


# Name space of the ids of records that are no events of ours.
_FOREIGN = UUID("6f726465-7266-4c6f-a77d-6465616400ff")


@dataclass(frozen=True, slots=True)
class Place:
    """Where in Kafka a delivery stands."""

    topic: str
    partition: int
    offset: int

    @classmethod
    def of(cls, record: Record) -> Place:
        """Where that record stands."""
        return cls(record.topic, record.partition, record.offset)

    def event_id(self) -> UUID:
        """For a record that has no id of its own, and the same at each delivery: a redelivery is no second letter."""
        return uuid5(_FOREIGN, repr(self))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A row of dead_letter_events, as people see it."""

    event_id: UUID
    event_type: str | None
    aggregate_id: UUID | None
    payload: Any
    reason: str
    failed_at: datetime
    error_class: str | None
    error_message: str | None
    attempts: list[dict[str, Any]]
    headers: dict[str, str]
    topic: str | None
    partition: int | None
    offset: int | None
    raw: bytes | None
    worker_id: str | None
    discarded_at: datetime | None
    discard_reason: str | None


class NotRedrivable(Exception):
    """This dead letter cannot be redriven; the text says why, and what can be done."""


def error_name(error: BaseException | None) -> str | None:
    """The class of an error as it is kept in a dead letter."""
    return None if error is None else type(error).__name__


@seam
async def bury_if_attempt(
    connection: Connection, message: Message, *, reason: str, failure: Failure | None, error: BaseException | None,
    place: Place | None, worker_id: str | None, published: bool = True, hold: bool = False,
) -> bool:  # fmt: skip
    """Bury an event of ours, in the caller's transaction; False where it was settled meanwhile, and nothing changed.

    `hold`: later events of its aggregate wait until it is redriven or discarded (see held.py).
    """
    row = await connection.fetchrow(
        _BURY_ROW_IF_ATTEMPT, message.id, message.attempt, failure.as_json() if failure else None, published
    )
    if row is None:
        return False
    if hold:
        await held.hold(connection, message.id)
    inserted = await connection.fetchval(
        _INSERT, message.id, message.type, message.aggregate_id, row["payload"], storable(reason), error_name(error),
        storable(str(error)) if error else None, row["failures"] or "[]", _foreign_json(dict(message.headers)),
        place.topic if place else None, place.partition if place else None, place.offset if place else None, worker_id,
    )  # fmt: skip
    return inserted is not None


@dataclass(frozen=True, slots=True)
class Foreign:
    """A record that has no outbox row here. `message` is None where it cannot be decoded; `raw` is its value, byte for byte."""

    event_id: UUID
    reason: str
    place: Place
    raw: bytes | None
    headers: dict[str, str]
    error: BaseException | None = None
    message: Message | None = None


@seam
async def bury_foreign(database: Database, records: Sequence[Foreign], worker_id: str) -> list[bool]:
    """Bury a group of records with their raw bytes; False for each that lies buried already."""
    rows = await database.fetch(
        _BURY_FOREIGN,
        [r.event_id for r in records],
        [r.message.type if r.message else None for r in records],
        [r.message.aggregate_id if r.message else None for r in records],
        [_foreign_json(r.message.payload) if r.message else None for r in records],
        [storable(r.reason) for r in records],
        [error_name(r.error) for r in records],
        [storable(str(r.error)) if r.error else None for r in records],
        [_foreign_json(r.headers) for r in records],
        [r.place.topic for r in records],
        [r.place.partition for r in records],
        [r.place.offset for r in records],
        [r.raw for r in records],
        worker_id,
    )
    inserted = {row["event_id"] for row in rows}
    return [r.event_id in inserted for r in records]


def _foreign_json(value: Any) -> str | None:
    """The JSON text of what came from outside; None where it cannot be written (nested too deep), as the raw bytes are kept."""
    try:
        text = orjson.dumps(value).decode()
    except TypeError:
        return None
    # jsonb has no NUL. An even number of backslashes before the escape is text of its own.
    return re.sub(r"(?<!\\)((?:\\\\)*)\\u0000", r"\1\\ufffd", text)


@seam
async def redrive(connection: Connection, event_id: UUID) -> tuple[str, UUID]:
    """Give a dead letter fresh attempts, in the caller's transaction. Returns its event type and aggregate id.

    Raises NotRedrivable when there is no such dead letter, it was discarded, or it has no outbox row to publish again.
    """
    row = await connection.fetchrow("SELECT discarded_at FROM dead_letter_events WHERE event_id = $1 FOR UPDATE", event_id)
    if row is None:
        raise NotRedrivable(f"{event_id}: no such dead letter")
    if row["discarded_at"] is not None:
        raise NotRedrivable(f"{event_id}: was discarded")
    moved = await connection.fetchrow(_UNBURY, event_id)
    if moved is None:
        raise NotRedrivable(f"{event_id}: has no outbox row, so nothing can be published again; discard it")
    await connection.execute("DELETE FROM dead_letter_events WHERE event_id = $1", event_id)
    await connection.execute("SELECT pg_notify($1, '')", CHANNEL)
    return moved["event_type"], moved["aggregate_id"]


@seam
async def discard_if_open(connection: Connection, event_id: UUID, reason: str) -> bool:
    """Close a dead letter for good, and let go what waits for it; False when there is none, or it is closed already."""
    async with connection.transaction():
        row = await connection.fetchrow(
            "UPDATE dead_letter_events SET discarded_at = now(), discard_reason = $2 "
            "WHERE event_id = $1 AND discarded_at IS NULL RETURNING aggregate_id",
            event_id, reason,
        )  # fmt: skip
        if row is not None and row["aggregate_id"] is not None:
            await held.release(connection, row["aggregate_id"], event_id)
    return row is not None


@seam
async def fetch(
    connection: Connection, *, event_ids: Sequence[UUID] | None = None, discarded: bool = False, limit: int = 1000
) -> list[DeadLetter]:
    """Dead letters, newest first: those named, or all open ones (`discarded`: the closed ones as well)."""
    rows = await connection.fetch(
        """
        SELECT event_id, event_type, aggregate_id, payload, reason, failed_at, error_class, error_message, attempts, headers,
               topic, partition, "offset", raw, worker_id, discarded_at, discard_reason
        FROM dead_letter_events
        WHERE ($1::uuid[] IS NULL OR event_id = ANY($1)) AND ($2 OR discarded_at IS NULL)
        ORDER BY failed_at DESC, event_id LIMIT $3
        """,
        event_ids, discarded, limit,
    )  # fmt: skip
    return [
        DeadLetter(**{
            **dict(row),
            "payload": orjson.loads(row["payload"]) if row["payload"] else None,
            "attempts": orjson.loads(row["attempts"]),
            "headers": orjson.loads(row["headers"]) if row["headers"] else {},
        })
        for row in rows
    ]  # fmt: skip
