"""processed_events: what was consumed. The consumer decides once, and this row is the decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from orderflow.engine.message import Message
from orderflow.engine.postgres import Database

# Joins, not EXISTS in the list: for that, PostgreSQL may read a whole table into memory first.
_LOOK_UP = """
SELECT o.event_id, o.event_type, o.aggregate_id, o.attempt, o.first_attempt,
       p.event_id IS NOT NULL AS processed, d.event_id IS NOT NULL AS buried
FROM outbox o LEFT JOIN processed_events p ON p.event_id = o.event_id LEFT JOIN dead_letter_events d ON d.event_id = o.event_id
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
    """What the database says of an event that is delivered. `begun`: what a Beginner's first step came to, if it was done."""

    event_type: str
    aggregate_id: UUID
    attempt: int
    first_attempt: int
    processed: bool
    buried: bool
    begun: object = None

    def is_fresh(self, attempt: int) -> bool:
        """Whether a delivery of that attempt still has something to decide."""
        return not self.processed and not self.buried and attempt >= self.attempt


async def look_up(database: Database, messages: Sequence[Message]) -> list[Known | None]:
    """What is known of each event; None for one without an outbox row here."""
    rows = await database.fetch(_LOOK_UP, [m.id for m in messages])
    known = {
        row["event_id"]: Known(
            row["event_type"], row["aggregate_id"], row["attempt"], row["first_attempt"], row["processed"], row["buried"]
        )
        for row in rows
    }
    return [known.get(m.id) for m in messages]


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
