"""Order within an aggregate where an event fails: those after it wait, and follow one after the other when it is settled.

For handlers that ask for it (`handling.InOrder`). An event that has to come again notes itself in held_aggregates, by the
statement that schedules or buries it; an event with such a note before it is put off and notes itself, too. What comes first of
its aggregate pays for nothing but the look into a table that is usually empty.

The note of an event that is settled holds nothing, whoever died before deleting it: what waits behind it comes back by itself.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from orderflow.engine.message import Message
from orderflow.engine.outcome import Postponed
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.seams import seam

# Seconds after which what waits looks for itself, by its age: whoever was to release it may have died.
SHORTEST = 1.0
LONGEST = 600.0

_HOLD = """
INSERT INTO held_aggregates (aggregate_id, seq, event_id) SELECT aggregate_id, seq, event_id FROM outbox WHERE event_id = $1
ON CONFLICT DO NOTHING
"""

# Up to this event: notes that nobody deleted are before it. A relay that sleeps is woken.
_RELEASE = """
WITH done AS (
    DELETE FROM held_aggregates
    WHERE aggregate_id = $1 AND seq <= (SELECT seq FROM outbox WHERE event_id = $2)
    RETURNING seq),
next AS (
    SELECT event_id FROM held_aggregates WHERE aggregate_id = $1 AND seq > (SELECT max(seq) FROM done) ORDER BY seq LIMIT 1),
due AS (
    UPDATE outbox o SET available_at = now() FROM next
    WHERE o.event_id = next.event_id AND o.published_at IS NULL AND o.available_at > now() AND o.available_at < 'infinity'
    RETURNING o.event_id)
SELECT pg_notify('orderflow_outbox', '') FROM due
"""


def behind(message: Message) -> Postponed:
    """What becomes of an event that has to wait for one before it."""
    age = (datetime.now(UTC) - message.created_at).total_seconds()
    return Postponed(timedelta(seconds=min(max(age, SHORTEST), LONGEST)))


@seam
async def hold(connection: Connection, event_id: UUID) -> None:
    """Note an event that is being buried, in that transaction."""
    await connection.execute(_HOLD, event_id)


@seam
async def release(database: Database | Connection, aggregate_id: UUID, event_id: UUID) -> None:
    """This event is settled: it holds nothing any more, and the next that waits is due."""
    await database.fetch(_RELEASE, aggregate_id, event_id)
