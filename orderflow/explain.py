"""One order's whole story on one time line: what was decided, written, published, consumed, attempted and charged.

It is put together from what the tables keep anyway. They keep the last publication of an event and every failed
attempt; an earlier publication shows only in the attempt that it led to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import MAXYEAR, UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Final
from uuid import UUID

import asyncpg
import orjson

from orderflow.engine.postgres import Connection
from orderflow.orders.model import IllegalTransition, State, path_to

# What happens first when a transaction gives several things the same time.
_RANK: Final = {
    "charge": 0, "attempt": 1, "delivery": 2, "dead letter": 3, "transition": 4, "event": 5, "publish": 6, "due": 7,
    "discard": 8, "retention": 9,
}  # fmt: skip


class Unknown(Exception):
    """Neither an order nor an event has this id."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened (or, for kind `due`, will). `since_previous` is None for the first."""

    at: datetime
    kind: str
    what: str
    detail: str = ""
    event_id: UUID | None = None
    since_previous: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Story:
    """An order and all that happened to it, oldest first. `state` and what follows is None where only events are known."""

    order_id: UUID
    entries: list[Entry]
    state: str | None = None
    version: int | None = None
    amount: Any = None
    failure: str | None = None
    took: timedelta | None = None


_EVENTS = """
SELECT o.event_id, o.event_type, o.created_at, o.published_at, o.available_at, o.attempt, o.first_attempt, o.failures,
       p.worker_id, p.processed_at
FROM outbox o LEFT JOIN processed_events p USING (event_id)
WHERE o.aggregate_id = $1 ORDER BY o.seq
"""

_DEAD_LETTERS = """
SELECT event_id, event_type, reason, failed_at, worker_id, attempts, discarded_at, discard_reason
FROM dead_letter_events WHERE aggregate_id = $1 ORDER BY failed_at
"""

_CHARGES = "SELECT id, amount, status, created_at FROM gateway_charges WHERE reference = $1 ORDER BY created_at"


async def story(connection: Connection, order_id: UUID) -> Story:
    """The story of an order, by its id or by the id of one of its events.

    Raises Unknown when neither exists.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        order_id = await _order_of(connection, order_id)
        order = await connection.fetchrow("SELECT * FROM orders WHERE id = $1", order_id)
        entries = [
            *(_transitions(order) if order else ()),
            *_events(await connection.fetch(_EVENTS, order_id)),
            *_dead_letters(await connection.fetch(_DEAD_LETTERS, order_id)),
            *_charges(await connection.fetch(_CHARGES, order_id)),
        ]
    line = _timed(sorted(entries, key=lambda entry: (entry.at, _RANK[entry.kind])))
    if order is None:
        return Story(order_id, line)
    return Story(
        order_id, line, order["state"], order["version"], order["amount"], order["failure"],
        order["updated_at"] - order["created_at"],
    )  # fmt: skip


async def _order_of(connection: Connection, any_id: UUID) -> UUID:
    found: UUID | None = await connection.fetchval(
        """
        SELECT id FROM orders WHERE id = $1
        UNION ALL (SELECT aggregate_id FROM outbox WHERE event_id = $1 OR aggregate_id = $1 LIMIT 1)
        UNION ALL (SELECT coalesce(aggregate_id, event_id) FROM dead_letter_events
                   WHERE event_id = $1 OR aggregate_id = $1 LIMIT 1)
        UNION ALL (SELECT reference FROM gateway_charges WHERE reference = $1 LIMIT 1)
        LIMIT 1
        """,
        any_id,
    )
    if found is None:
        raise Unknown(f"no order and no event has the id {any_id}")
    return found


def _transitions(order: asyncpg.Record) -> Iterator[Entry]:
    times: list[datetime] = list(order["entered_at"])
    try:
        path = path_to(State(order["state"]), order["version"])
    except (IllegalTransition, ValueError):
        yield Entry(
            order["updated_at"], "transition", str(order["state"]),
            f"version {order['version']}: no legal path leads here (see `orderflow audit`)",
        )  # fmt: skip
        return
    if order["retired_at"] is not None:
        what = "deleted: events, deliveries and charges"
        yield Entry(order["retired_at"], "retention", what, "finished and older than ORDERFLOW_RETENTION_DAYS")
    for version, (state, at) in enumerate(zip(path, times, strict=False), 1):
        before = "" if version == 1 else f"{path[version - 2]} -> "
        last = version == len(path)
        why = f", {order['failure']}" if last and order["failure"] else ""
        amount = f", amount {order['amount']}" if version == 1 else ""
        yield Entry(at, "transition", f"{before}{state}", f"version {version}{amount}{why}")


def _events(rows: list[asyncpg.Record]) -> Iterator[Entry]:
    for row in rows:
        kind, event_id = row["event_type"], row["event_id"]
        yield Entry(row["created_at"], "event", f"{kind} written", "to the outbox", event_id)
        yield from _failures(kind, event_id, row["failures"])
        if row["published_at"] is not None:
            again = f"attempt {row['attempt']}" if row["attempt"] > 1 else ""
            yield Entry(row["published_at"], "publish", f"{kind} published", again, event_id)
        elif row["available_at"] is not None and _is_finite(row["available_at"]):
            yield Entry(row["available_at"], "due", f"{kind} due again", f"attempt {row['attempt']}", event_id)
        if row["processed_at"] is not None:
            yield Entry(row["processed_at"], "delivery", f"{kind} processed", f"by {row['worker_id']}", event_id)


def _is_finite(at: datetime) -> bool:
    # asyncpg shows 'infinity', which stands for a buried row, as the last moment that Python knows.
    return at.year < MAXYEAR


def _failures(event_type: str, event_id: UUID, failures: str | None) -> Iterator[Entry]:
    for failure in orjson.loads(failures or "[]"):
        at = _time(failure.get("at"))
        if at is not None:
            what = f"{event_type} attempt {failure.get('attempt')} failed"
            yield Entry(at, "attempt", what, f"{failure.get('error')}: {failure.get('message')}", event_id)


def _time(text: object) -> datetime | None:
    try:
        at = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _dead_letters(rows: list[asyncpg.Record]) -> Iterator[Entry]:
    for row in rows:
        by = f" (by {row['worker_id']})" if row["worker_id"] else ""
        what = row["event_type"] or "a record"
        yield Entry(row["failed_at"], "dead letter", f"{what} buried", f"{row['reason']}{by}", row["event_id"])
        if row["discarded_at"] is not None:
            yield Entry(row["discarded_at"], "discard", f"{what} discarded", row["discard_reason"], row["event_id"])


def _charges(rows: list[asyncpg.Record]) -> Iterator[Entry]:
    for row in rows:
        yield Entry(
            row["created_at"],
            "charge",
            f"gateway charge {row['status']}",
            f"{row['amount']}, charge {row['id']}",
        )


def _timed(entries: list[Entry]) -> list[Entry]:
    later = (replace(entry, since_previous=entry.at - before.at) for before, entry in pairwise(entries))
    return [*entries[:1], *later]
