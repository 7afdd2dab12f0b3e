"""Where a relay reads on in each shard, and the durable low-water mark that it leaves behind.

A row's number is handed out before its transaction commits, so a smaller number may become visible after a larger one, and
whoever reads on from the largest number seen loses rows, or publishes an aggregate's events out of order. A round therefore
begins at a mark, which moves only up to a *fence*: what had been published when the writers at work were looked at, once all of
these have ended and a later round has read again from the mark. An INSERT locks its table before it takes a number, so the
writers are those who hold that lock. (PostgreSQL's own horizon, `pg_snapshot_xmin`, is held back by transactions that never
touched this table.)

A writer that stays at work for long, a batch job of another program say, must not make each round read all that was published
since: it is set apart. The mark moves on without it, and each fetch is followed by a look whether it is still at work. If not,
its rows may be among what was passed, and the round begins where the mark was before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from orderflow.engine import outbox
from orderflow.engine.outbox import SHARDS, Due
from orderflow.engine.postgres import Connection
from orderflow.engine.seams import seam

# Seconds between two looks at the writers, while there is work and while there is none; after the first it is set apart, too.
LOOK_EVERY = 0.1
LOOK_EVERY_IDLE = 5.0
LONG = 1.0
SAVE_EVERY = 1.0

_LAST = "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('outbox', 'seq')::regclass), 0)"

_WRITERS = """
SELECT virtualtransaction FROM pg_locks
WHERE locktype = 'relation' AND relation = 'outbox'::regclass AND mode = 'RowExclusiveLock'
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

_LOAD = "SELECT shard, seq FROM outbox_low_water WHERE shard = ANY($1::smallint[])"

_SAVE = """
INSERT INTO outbox_low_water AS w (shard, seq) SELECT * FROM unnest($1::smallint[], $2::bigint[]) ORDER BY 1
ON CONFLICT (shard) DO UPDATE SET seq = excluded.seq WHERE w.seq < excluded.seq
"""

# The rows themselves, for whoever wants to know how many wait.
NEVER_PUBLISHED = f"""
SELECT o.* FROM generate_series(0, {SHARDS - 1}) AS s(shard) LEFT JOIN outbox_low_water w ON w.shard = s.shard
JOIN LATERAL (SELECT * FROM outbox WHERE shard = s.shard AND seq > coalesce(w.seq, 0)) AS o ON true
WHERE o.published_at IS NULL AND o.available_at IS NULL
"""


# What a relay of these shards could publish now, counted up to a limit.
_WAITING = f"""
SELECT count(*), coalesce(extract(epoch FROM max(now() - greatest(created_at, available_at))), 0)::float8
FROM ((SELECT created_at, available_at FROM ({NEVER_PUBLISHED}) AS n WHERE shard::integer = ANY($1::integer[]) LIMIT $2)
      UNION ALL
      (SELECT created_at, available_at FROM outbox
       WHERE available_at <= now() AND available_at < 'infinity' AND published_at IS NULL
         AND shard::integer = ANY($1::integer[]) LIMIT $2)) AS w
"""


@dataclass(frozen=True, slots=True)
class _Fence:
    """`last`: the last number handed out at that time; `writers`: who was at work then, and may bring one up to it later."""

    last: int
    writers: frozenset[str]
    since: float


class Positions:
    """Of one relay. A round is: `fetch`; publish and mark what it found; `handled`."""

    def __init__(self) -> None:
        self._begin({})

    def _begin(self, marks: dict[int, int]) -> None:
        self._mark = marks
        self._saved = dict(marks)
        self._save_at = 0.0
        self._fence: _Fence | None = None
        # Nothing up to this number is still to become visible, but for what those who are set apart may bring.
        self._settled = 0
        self._look_at = 0.0
        # Those who are set apart, and where the mark was before the first of them was.
        self._apart: frozenset[str] = frozenset()
        self._before: dict[int, int] = {}

    @seam
    async def fetch(self, connection: Connection, shards: Sequence[int], limit: int) -> Due:
        """What is due in these shards, from the mark on."""
        if self._mark.keys() != set(shards):
            # What was known of a shard that was another relay's meanwhile is worth nothing.
            rows = {row["shard"]: row["seq"] for row in await connection.fetch(_LOAD, shards)}
            self._begin({shard: rows.get(shard, 0) for shard in shards})
        due = await outbox.fetch_due(connection, shards, limit, [self._mark[shard] for shard in shards])
        # After the fetch: what it found that was written after the end of one of them must not be published before its rows.
        if self._apart and not self._apart <= await _writers(connection):
            self._mark, self._apart, self._fence, self._settled = self._before, frozenset(), None, 0
            due = await outbox.fetch_due(connection, shards, limit, [self._mark[shard] for shard in shards])
        return due

    @seam
    async def handled(self, connection: Connection, due: Due) -> None:
        """All that the round fetched is marked, buried or scheduled."""
        now = time.monotonic()
        for shard, seq in self._mark.items():
            # Of a shard that may hold more, only what was fetched has been handled.
            passed = min(self._settled, due.reached.get(shard, 0)) if shard in due.full else self._settled
            if passed > seq:
                self._mark[shard] = passed
        if now >= self._look_at:
            await self._look(connection, now)
            self._look_at = now + (LOOK_EVERY if due.messages or self._fence else LOOK_EVERY_IDLE)
        elif due.messages:
            self._look_at = min(self._look_at, now + LOOK_EVERY)
        if now >= self._save_at:
            self._save_at = now + SAVE_EVERY
            await self._save(connection)

    @seam
    async def _look(self, connection: Connection, now: float) -> None:
        # In this order: a transaction that takes a number after the first question is none of this fence's.
        last: int = await connection.fetchval(_LAST)
        writers = await _writers(connection) - self._apart
        if last < max(self._mark.values(), default=0):
            # TRUNCATE ... RESTART IDENTITY: the numbers begin anew, all of them below the marks.
            await connection.execute("DELETE FROM outbox_low_water")
            self._begin({})
            return
        fence = self._fence or _Fence(last, writers, now)
        if not fence.writers & writers:
            # All of them have ended: the next round that begins at the mark sees everything up to the fence.
            self._settled = fence.last
            self._fence = _Fence(last, writers, now) if fence.last < last else None
        elif now - fence.since < LONG:
            self._fence = fence
        else:
            if not self._apart:
                self._before = dict(self._mark)
            self._apart |= fence.writers & writers
            self._fence = None

    @seam
    async def _save(self, connection: Connection) -> None:
        safe = self._before if self._apart else self._mark
        raised = {shard: seq for shard, seq in safe.items() if seq > self._saved[shard]}
        if raised:
            await connection.execute(_SAVE, list(raised), list(raised.values()))
            self._saved.update(raised)


@seam
async def waiting(connection: Connection, shards: Sequence[int], limit: int) -> tuple[int, float]:
    """How many events of these shards are due, counted up to about `limit`, and for how many seconds the oldest has been."""
    row = await connection.fetchrow(_WAITING, shards, limit)
    assert row is not None
    return row[0], row[1]


@seam
async def _writers(connection: Connection) -> frozenset[str]:
    return frozenset(row["virtualtransaction"] for row in await connection.fetch(_WRITERS))
