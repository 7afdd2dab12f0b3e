"""The outbox table: append, fetch what is due, mark what Kafka acknowledged, make a row due again.

Publishing, retrying, redriving, reconciling and replaying are all the same act on the row; each function here is one of them,
and the guard of each stands in its name and in its WHERE.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import orjson

from orderflow.engine.message import OUR_HEADERS, Message
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.seams import seam

SHARDS = 32
CHANNEL = "orderflow_outbox"

# LATERAL with a limit a shard: an index probe for each, whose cost does not depend on what other relays' shards hold,
# and a shard with a million rows does not keep the others waiting. Scheduled rows stand anywhere in their shard's order, and so
# say nothing of how far it has been read: they come without a shard. (The cast keeps `outbox_log` out of it: a plan that is
# made while the table is empty might take that, and read all of the shards for ever.)
_FETCH_DUE = """
SELECT r.event_id, r.event_type, r.aggregate_type, r.aggregate_id, r.payload, r.created_at, r.attempt, r.headers, r.seq, r.shard
FROM unnest($1::integer[], $2::bigint[]) AS s(shard, after) CROSS JOIN LATERAL (
    SELECT o.* FROM outbox o
    WHERE o.shard = s.shard AND o.seq > s.after AND o.published_at IS NULL AND o.available_at IS NULL
    ORDER BY o.seq LIMIT $3) AS r
UNION ALL
(SELECT event_id, event_type, aggregate_type, aggregate_id, payload, created_at, attempt, headers, seq, NULL
 FROM outbox
 WHERE available_at <= now() AND available_at < 'infinity' AND published_at IS NULL AND shard::integer = ANY($1::integer[])
 ORDER BY available_at, seq LIMIT $4)
ORDER BY seq
"""

_APPEND = """
INSERT INTO outbox (event_id, event_type, aggregate_type, aggregate_id, payload, headers) VALUES ($1, $2, $3, $4, $5, $6)
"""

_GET = """
SELECT event_id, event_type, aggregate_type, aggregate_id, payload, created_at, attempt, headers FROM outbox WHERE event_id = $1
"""

# The attempt guard: a consumer that was faster than this statement may have failed the event and made it due again, as the
# next attempt; marking that one published would lose the retry.
_MARK_PUBLISHED = """
UPDATE outbox SET published_at = now(), available_at = NULL
WHERE event_id = ANY($1::uuid[]) AND attempt = $2 AND published_at IS NULL
"""
_MARK_PUBLISHED_EACH = """
UPDATE outbox o SET published_at = now(), available_at = NULL
FROM unnest($1::uuid[], $2::integer[]) AS m(event_id, attempt)
WHERE o.event_id = m.event_id AND o.attempt = m.attempt AND o.published_at IS NULL
"""

_WITHDRAW_IF_PROCESSED = """
UPDATE outbox SET available_at = 'infinity'
WHERE event_id = $1 AND EXISTS (SELECT FROM processed_events p WHERE p.event_id = $1)
"""

# A postponement, which has no failure, raises both numbers: the attempts that count are as many as before, and yet the mark of
# a relay that is slower than the worker cannot take the new schedule away, and the old record is a duplicate.
# A relay that sleeps learns from the notification that there is something to wake up for earlier than its next poll.
_REPUBLISH_IF_ATTEMPT = """
WITH moved AS (
    UPDATE outbox o
    SET published_at = NULL, available_at = now() + r.delay, attempt = o.attempt + 1,
        first_attempt = o.first_attempt + (r.failure IS NULL)::integer,
        failures = CASE WHEN r.failure IS NULL THEN o.failures ELSE coalesce(o.failures, '[]') || r.failure END
    FROM unnest($1::uuid[], $2::integer[], $3::interval[], $4::jsonb[], $5::boolean[])
         AS r(event_id, attempt, delay, failure, hold)
    WHERE o.event_id = r.event_id AND o.attempt = r.attempt AND o.available_at IS DISTINCT FROM 'infinity'
    RETURNING o.event_id, o.aggregate_id, o.seq, r.hold),
held AS (
    INSERT INTO held_aggregates (aggregate_id, seq, event_id) SELECT aggregate_id, seq, event_id FROM moved WHERE hold
    ON CONFLICT DO NOTHING)
SELECT event_id, pg_notify('orderflow_outbox', '') FROM moved
"""

_NEXT_DUE = """
SELECT extract(epoch FROM min(available_at) - now())::float8 FROM outbox
WHERE available_at < 'infinity' AND published_at IS NULL AND shard::integer = ANY($1::integer[])
"""

_REPLAY = """
UPDATE outbox SET published_at = NULL, available_at = now()
WHERE event_id = ANY($1::uuid[]) AND available_at IS DISTINCT FROM 'infinity'
RETURNING event_id
"""

# Published, and yet neither processed nor buried: Kafka or a worker has lost it.
_REPUBLISH_UNSETTLED = """
UPDATE outbox SET published_at = NULL, available_at = now()
WHERE event_id IN (
    SELECT o.event_id FROM outbox o
    WHERE o.created_at >= $1 AND o.published_at < now() - $2::interval
      AND NOT EXISTS (SELECT FROM processed_events p WHERE p.event_id = o.event_id)
      AND NOT EXISTS (SELECT FROM dead_letter_events d WHERE d.event_id = o.event_id)
    ORDER BY o.created_at LIMIT $3)
  AND published_at < now() - $2::interval
RETURNING event_id
"""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt, as it is kept on the row and in the dead letter."""

    attempt: int
    at: datetime
    error: str
    message: str

    @classmethod
    def of(cls, attempt: int, error: BaseException) -> Failure:
        """The failure of that attempt, now."""
        return cls(attempt, datetime.now(UTC), type(error).__name__, storable(str(error))[:2000])

    def as_json(self) -> str:
        """The JSON object that stands in `outbox.failures`."""
        return orjson.dumps({"attempt": self.attempt, "at": self.at, "error": self.error, "message": self.message}).decode()


@dataclass(frozen=True, slots=True)
class Republish:
    """This row, which was delivered as `attempt`, is due again after `delay`: a retry, or without a failure a postponement.

    `hold`: later events of its aggregate wait for it (see held.py).
    """

    event_id: UUID
    attempt: int
    delay: timedelta
    failure: Failure | None
    hold: bool = False


@dataclass(frozen=True, slots=True)
class Due:
    """What a fetch found. `reached`: the largest number among what was never published, by shard; `full`: the shards that may
    hold more beyond it.
    """

    messages: list[Message]
    reached: dict[int, int]
    full: set[int]


@seam
async def append(connection: Connection, messages: Iterable[Message]) -> None:
    """Write events in the caller's transaction, along with the change they tell of."""
    rows = [
        (m.id, m.type, m.aggregate_type, m.aggregate_id, _json(m.payload), _json(dict(m.headers)) if m.headers else None)
        for m in messages
    ]
    await connection.executemany(_APPEND, rows)


def storable(text: str) -> str:
    """The text as PostgreSQL can keep it, which takes neither NUL nor half a surrogate pair."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _json(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


@seam
async def fetch_due(connection: Connection, shards: Sequence[int], limit: int, after: Sequence[int] | None = None) -> Due:
    """At most about `limit` events of these shards that are due, in the order of their aggregates' transitions.

    `after`: for each shard, the number after which to look for what was never published; from the beginning without it.
    """
    a_shard = max(32, limit // max(1, len(shards)))
    rows = await connection.fetch(_FETCH_DUE, shards, after or [0] * len(shards), a_shard, limit)
    messages, reached, counts = [], {}, dict.fromkeys(shards, 0)
    for event_id, kind, aggregate_type, aggregate_id, payload, created_at, attempt, headers, seq, shard in rows:
        messages.append(
            Message(
                event_id, kind, aggregate_type, aggregate_id, payload, created_at, attempt, _headers(headers) if headers else {}
            )
        )
        if shard is not None:
            reached[shard] = seq
            counts[shard] += 1
    return Due(messages, reached, {shard for shard, count in counts.items() if count >= a_shard})


@seam
async def get(database: Database, event_id: UUID) -> Message | None:
    """One event as it would be published now, or None."""
    row = await database.fetchrow(_GET, event_id)
    if row is None:
        return None
    event_id, kind, aggregate_type, aggregate_id, payload, created_at, attempt, headers = row
    return Message(event_id, kind, aggregate_type, aggregate_id, payload, created_at, attempt, _headers(headers))


def _headers(text: str | None) -> dict[str, str]:
    """Another program may have written anything: what is no text, or would pass for a header of ours, is left out."""
    found = orjson.loads(text) if text else None
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str) and name not in OUR_HEADERS}


@seam
async def next_due(connection: Connection, shards: Sequence[int]) -> float | None:
    """Seconds until the earliest scheduled event of these shards is due; None when nothing is scheduled."""
    seconds: float | None = await connection.fetchval(_NEXT_DUE, shards)
    return seconds


@seam
async def withdraw_if_processed(connection: Connection, message: Message) -> None:
    """Take a row that cannot be published, and need not be, out of every relay's reach."""
    await connection.execute(_WITHDRAW_IF_PROCESSED, message.id)


@seam
async def mark_published_if_attempt(connection: Connection, messages: Sequence[Message]) -> None:
    """Note Kafka's acknowledgement of these events, each only while it is still at the attempt that was sent."""
    event_ids, attempts = [m.id for m in messages], [m.attempt for m in messages]
    if len(set(attempts)) == 1:
        await connection.execute(_MARK_PUBLISHED, event_ids, attempts[0])
    else:
        await connection.execute(_MARK_PUBLISHED_EACH, event_ids, attempts)


@seam
async def republish_if_attempt(database: Database, retries: Sequence[Republish]) -> list[bool]:
    """Schedule retries and postponements in one statement; False where another delivery of the same attempt was first."""
    rows = await database.fetch(
        _REPUBLISH_IF_ATTEMPT,
        [r.event_id for r in retries],
        [r.attempt for r in retries],
        [r.delay for r in retries],
        [r.failure.as_json() if r.failure else None for r in retries],
        [r.hold for r in retries],
    )
    moved = {row["event_id"] for row in rows}
    return [r.event_id in moved for r in retries]


@seam
async def replay(connection: Connection, event_ids: Sequence[UUID]) -> int:
    """Publish these rows again, as the attempt they are at; buried rows stay buried. Returns how many."""
    return len(await connection.fetch(_REPLAY, event_ids))


@seam
async def republish_unsettled(
    connection: Connection, *, since: datetime, published_before: timedelta, limit: int
) -> list[UUID]:
    """Publish again what was published longer than `published_before` ago and has been neither processed nor buried."""
    return [row["event_id"] for row in await connection.fetch(_REPUBLISH_UNSETTLED, since, published_before, limit)]


@seam
async def select_for_replay(
    connection: Connection,
    *,
    aggregate_id: UUID | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    event_type: str | None = None,
) -> list[UUID]:
    """The events that match every filter given, oldest first; buried ones are not among them."""
    rows = await connection.fetch(
        """
        SELECT event_id FROM outbox
        WHERE ($1::uuid IS NULL OR aggregate_id = $1) AND ($2::timestamptz IS NULL OR created_at >= $2)
          AND ($3::timestamptz IS NULL OR created_at < $3) AND ($4::text IS NULL OR event_type = $4)
          AND available_at IS DISTINCT FROM 'infinity'
        ORDER BY seq
        """,
        aggregate_id, since, until, event_type,
    )  # fmt: skip
    return [row["event_id"] for row in rows]
