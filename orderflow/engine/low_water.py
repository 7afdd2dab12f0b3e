"""Where a relay reads on in each shard: its positions in memory, and the durable low-water mark behind them.

A row's number is handed out before its transaction commits, so a smaller number may become visible after a larger one, and
whoever reads on from the largest number seen loses rows. A round therefore begins where the relay was a moment ago, which finds
what commits at the same time. Now and then, and after a pause, it begins at the low-water mark, which finds what commits late.
The mark moves only up to a fence: a number such that every transaction has ended that had locked the table when that number was
the last one. An INSERT locks the table before it takes a number, so nothing up to the fence is still to come. (PostgreSQL's own
horizon, `pg_snapshot_xmin`, is held back by transactions that never touched this table.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from orderflow.engine.outbox import SHARDS
from orderflow.engine.postgres import Connection

# All in seconds. How far behind its newest position a round begins, at the least.
BEHIND = 0.1
# How often a busy relay begins at the low-water mark, and what share of its time that may take when the mark is far behind, as
# while somebody's transaction with a row for the outbox stays open.
SWEEP_EVERY = 1.0
SWEEP_SHARE = 0.05
FENCE_EVERY = 5.0

_LAST = "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('outbox', 'seq')::regclass), 0)"

_WRITERS = """
SELECT virtualtransaction FROM pg_locks
WHERE locktype = 'relation' AND relation = 'outbox'::regclass AND mode = 'RowExclusiveLock'
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

_LOAD = "SELECT shard, seq FROM outbox_low_water WHERE shard = ANY($1::smallint[])"

_RAISE = """
INSERT INTO outbox_low_water AS w (shard, seq) SELECT * FROM unnest($1::smallint[], $2::bigint[]) ORDER BY 1
ON CONFLICT (shard) DO UPDATE SET seq = excluded.seq WHERE w.seq < excluded.seq
"""


# The rows themselves, for whoever wants to know how many wait.
NEVER_PUBLISHED = f"""
SELECT o.* FROM generate_series(0, {SHARDS - 1}) AS s(shard) LEFT JOIN outbox_low_water w ON w.shard = s.shard
JOIN LATERAL (SELECT * FROM outbox WHERE shard = s.shard AND seq > coalesce(w.seq, 0)) AS o ON true
WHERE o.published_at IS NULL AND o.available_at IS NULL
"""


@dataclass(frozen=True, slots=True)
class _Fence:
    """`last`: the last number handed out at that time. `writers`: the transactions that may bring one up to it later."""

    last: int
    writers: frozenset[str]


class Positions:
    """Of one relay. A round is: `begin`; fetch, publish and mark; `handled`."""

    def __init__(self) -> None:
        self._low: dict[int, int] = {}
        self._newest: dict[int, int] = {}
        # What `_newest` was one to two times BEHIND ago, and what takes its place next.
        self._recent: dict[int, int] = {}
        self._snapshot: dict[int, int] = {}
        self._snapshot_at = 0.0
        self._busy_at = 0.0
        self._sweeping = False
        self._began = 0.0
        self._sweep_at = 0.0
        self._fence: _Fence | None = None
        self._fence_at = 0.0
        # Nothing up to this number is still to become visible.
        self._settled = 0

    async def begin(self, connection: Connection, shards: Sequence[int]) -> list[int]:
        """The numbers after which this round reads, one for each of the relay's shards."""
        self._began = now = time.monotonic()
        if self._low.keys() != set(shards):
            # What was known of a shard that was another relay's meanwhile is worth nothing.
            rows = {row["shard"]: row["seq"] for row in await connection.fetch(_LOAD, shards)}
            self._low = {shard: rows.get(shard, 0) for shard in shards}
            self._newest, self._snapshot, self._recent = dict(self._low), dict(self._low), dict(self._low)
            self._sweep_at = now
        self._sweeping = now >= self._sweep_at or now - self._busy_at >= BEHIND
        if now - self._snapshot_at >= BEHIND:
            self._recent, self._snapshot, self._snapshot_at = self._snapshot, dict(self._newest), now
        return [(self._low if self._sweeping else self._recent)[shard] for shard in shards]

    async def handled(self, connection: Connection, reached: dict[int, int], full: set[int]) -> None:
        """All that the round fetched is marked, buried or scheduled.

        `reached`: the largest number that was fetched, by shard; `full`: the shards that may hold more beyond it.
        """
        now = time.monotonic()
        if reached:
            self._busy_at = now
        for shard, seq in reached.items():
            self._newest[shard] = max(seq, self._newest[shard])
        if self._sweeping:
            self._sweep_at = now + max(SWEEP_EVERY, (now - self._began) / SWEEP_SHARE)
            raised = {
                shard: seq for shard, low in self._low.items()
                if (seq := min(self._settled, reached[shard]) if shard in full else self._settled) > low
            }  # fmt: skip
            if raised:
                await connection.execute(_RAISE, list(raised), list(raised.values()))
                self._low.update(raised)
        if now >= self._fence_at:
            self._fence_at = now + FENCE_EVERY
            await self._look_at_fence(connection)

    async def _look_at_fence(self, connection: Connection) -> None:
        # In this order: a transaction that takes a number after the first look is none of this fence's.
        last = await connection.fetchval(_LAST)
        writers = frozenset(row["virtualtransaction"] for row in await connection.fetch(_WRITERS))
        if last < max(self._low.values(), default=0):
            # TRUNCATE ... RESTART IDENTITY: the numbers begin anew, all of them below the marks.
            await connection.execute("DELETE FROM outbox_low_water")
            self._low, self._fence, self._settled = {}, None, 0
        elif not writers:
            self._fence, self._settled = None, last
        elif self._fence is None or not self._fence.writers & writers:
            self._settled = self._fence.last if self._fence else self._settled
            self._fence = _Fence(last, writers)
