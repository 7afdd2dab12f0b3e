"""processed_events: what was consumed. The consumer decides once, and this row is the decision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from orderflow.engine import outbox
from orderflow.engine.message import Headers, Message
from orderflow.engine.postgres import Database
from orderflow.engine.seams import seam

# Joins, not EXISTS in the list: for that, PostgreSQL may read a whole table into memory first.
_LOOK_UP = """
SELECT o.event_id, o.event_type, o.aggregate_id, o.attempt, o.first_attempt,
       p.event_id IS NOT NULL AS processed, d.event_id IS NOT NULL AS buried, h.held IS NOT NULL AS held
FROM outbox o LEFT JOIN processed_events p ON p.event_id = o.event_id LEFT JOIN dead_letter_events d ON d.event_id = o.event_id
LEFT JOIN LATERAL (
    SELECT true AS held FROM held_aggregates h LEFT JOIN processed_events hp ON hp.event_id = h.event_id
         LEFT JOIN dead_letter_events hd ON hd.event_id = h.event_id AND hd.discarded_at IS NOT NULL
    WHERE h.aggregate_id = o.aggregate_id AND h.seq < o.seq AND hp.event_id IS NULL AND hd.event_id IS NULL
    LIMIT 1) AS h ON true
WHERE o.event_id = ANY($1::uuid[])
"""

# In the order of the key, so that two workers that record overlapping groups cannot wait for each other in a circle. Never for
# a buried event: an event is processed or dead-lettered, not both. Never without its own outbox row: a record that borrows the
# id of another event would have that one skipped as processed. Nor without its
# aggregate, for the types that tell of one of ours.
_RECORD = """
WITH recorded AS (
INSERT INTO processed_events (event_id, worker_id)
SELECT t.event_id, $4 FROM unnest($1::uuid[], $2::text[], $3::uuid[]) AS t(event_id, event_type, aggregate_id)
JOIN outbox o ON o.event_id = t.event_id AND o.event_type = t.event_type AND o.aggregate_id = t.aggregate_id
LEFT JOIN dead_letter_events d ON d.event_id = t.event_id{joins}
WHERE d.event_id IS NULL{exists}
ORDER BY t.event_id
ON CONFLICT (event_id) DO NOTHING
RETURNING event_id)
SELECT CASE WHEN count(*) < cardinality($1) THEN coalesce(array_agg(event_id), '{{}}') END FROM recorded
"""


def record_statement(subjects: Mapping[str, str]) -> str:
    """The statement for `record`. `subjects`: for the event types whose aggregate has to exist here, its table (key `id`)."""
    tables = sorted(set(subjects.values()))
    joins = "".join(f"\nLEFT JOIN {table} ON {table}.id = t.aggregate_id" for table in tables)
    known = "".join(f" WHEN '{kind}' THEN {table}.id IS NOT NULL" for kind, table in subjects.items())
    return _RECORD.format(joins=joins, exists=f"\n  AND CASE t.event_type{known} ELSE true END" if subjects else "")


@dataclass(slots=True)
class Known:
    """What the database says of an event that is delivered. `begun`: what a Beginner's first step came to, if it was done;
    `held`: another of its aggregate comes first (see held.py).
    """

    event_type: str
    aggregate_id: UUID
    attempt: int
    first_attempt: int
    processed: bool
    buried: bool
    begun: object = None
    held: bool = False

    def is_fresh(self, attempt: int) -> bool:
        """Whether a delivery of that attempt still has something to decide."""
        return not self.processed and not self.buried and attempt >= self.attempt


@seam
async def look_up(database: Database, messages: Sequence[Message]) -> list[Known | None]:
    """What is known of each event; None for one without an outbox row here."""
    rows = await database.fetch(_LOOK_UP, [m.id for m in messages])
    known = {
        row["event_id"]: Known(
            row["event_type"],
            row["aggregate_id"],
            row["attempt"],
            row["first_attempt"],
            row["processed"],
            row["buried"],
            held=row["held"],
        )
        for row in rows
    }
    return [known.get(m.id) for m in messages]


@seam
async def retired(database: Database, tables: Iterable[str], messages: Sequence[Message]) -> list[bool]:
    """Whether each event tells of an aggregate in one of these tables (key `id`) of which retention has left no event.

    Its own row is gone, and yet it is no stranger's: Kafka has kept the record for longer than it was said to.
    """
    ids = [m.aggregate_id for m in messages]
    gone: set[UUID] = set()
    for table in tables:
        rows = await database.fetch(f"SELECT id FROM {table} WHERE id = ANY($1::uuid[]) AND retired_at IS NOT NULL", ids)
        gone.update(row["id"] for row in rows)
    return [aggregate_id in gone for aggregate_id in ids]


@seam
async def refuse_unless_writable(database: Database, tables: Iterable[str]) -> None:
    """Raise a transient error where no delivery could be settled now: the server is away or read-only, a table is locked.

    Nothing is written. `tables`: those of the aggregates, with a key `id`.
    """
    async with database.transaction() as connection:
        for table in tables:
            await connection.execute(f"UPDATE {table} SET id = id WHERE false")
        await connection.execute(
            "INSERT INTO processed_events (event_id, worker_id) SELECT event_id, worker_id FROM processed_events WHERE false"
        )
        await connection.execute("UPDATE outbox SET published_at = published_at WHERE false")


@seam
async def record(database: Database, statement: str, messages: Sequence[Message], worker_id: str) -> list[bool]:
    """Note events as processed, by a statement of `record_statement`.

    False for each that was decided before, or has no outbox row of its type and aggregate, or no aggregate.
    """
    recorded: list[UUID] | None = await database.fetchval(
        statement, [m.id for m in messages], [m.type for m in messages], [m.aggregate_id for m in messages], worker_id
    )
    # Nearly always all of them, and then they are not named.
    if recorded is None:
        return [True] * len(messages)
    found = set(recorded)
    return [m.id in found for m in messages]


@seam
async def source_of(database: Database, value: bytes | None, headers: Headers) -> Message | None:
    """The outbox row that a record was published from, byte for byte: PostgreSQL keeps JSON that no worker can read.

    Buried as a stranger's, its row would be published again by every turn of the janitor.
    """
    try:
        event_id = UUID((dict(headers).get("event-id") or b"").decode())
    except ValueError:
        return None
    message = await outbox.get(database, event_id)
    return message if message is not None and message.encode()[1] == value else None
