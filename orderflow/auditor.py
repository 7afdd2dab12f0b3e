"""The continuous auditor: the invariants of `audit`, checked a few orders at a time beside the work, in one elected process.

Each turn looks at the newest orders that are old enough to be judged, at the next ones of a slow patrol round the whole table,
at the oldest in flight (for I6), and again at those that were wrong before. What a turn costs does not grow with the table.
Only what is terminal and has been so for the reconcile horizon is judged, in one snapshot: work under way is no violation.

A violation is told once, as AUDIT_VIOLATION; how many are known is shown by the metrics and by the /readyz of every process,
and makes none unready: the work goes on, and somebody should look (`orderflow explain ID`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Final
from uuid import UUID

import asyncpg

from orderflow import audit_result
from orderflow.audit import I6, INVARIANTS, RECONCILE_HORIZON, Violation, violations_of
from orderflow.engine.patience import is_transient, within
from orderflow.engine.postgres import close_connection, connect
from orderflow.engine.seams import seam
from orderflow.engine.telemetry import PROCESS, emit
from orderflow.health import Health

# Held by the elected process for as long as its session lives.
AUDITOR_LOCK: Final = 0x6F66_0012_0000_0000
EVERY: Final = 10.0
STATEMENT_SECONDS: Final = 30.0
# Orders of a turn: the newest, and as many of the patrol; the oldest in flight; those known to be wrong.
WINDOW: Final = 250
MOST_IN_FLIGHT: Final = 100
MOST_KNOWN: Final = 1000
# I7 is the clients' own record.
OF_TERMINAL: Final = tuple(invariant for invariant in INVARIANTS if invariant.name not in ("I6", "I7"))

# Times as text: another program's may be none that Python knows.
_WINDOW: Final = """
SELECT id, created_at::text AS at, NOT in_flight AND updated_at < now() - $1::interval AS judged FROM orders
WHERE created_at < now() - $1::interval AND (created_at, id) > ($2::text::timestamptz, $3::uuid)
ORDER BY created_at {0}, id {0} LIMIT $4
"""
_NEWEST: Final = _WINDOW.format("DESC")
_NEXT: Final = _WINDOW.format("ASC")
_LONGEST_IN_FLIGHT: Final = """
SELECT id FROM orders WHERE in_flight AND created_at < now() - $1::interval ORDER BY created_at, id LIMIT $2
"""

_Place = tuple[str, UUID]
_BEGINNING: Final[_Place] = ("-infinity", UUID(int=0))


class Auditor:
    """Checks `WINDOW` orders twice every few seconds, on a session of its own. `horizon` in seconds."""

    name = "auditor"

    def __init__(self, direct_url: str, health: Health, *, horizon: float = RECONCILE_HORIZON) -> None:
        self._url = direct_url
        self._health = health
        self._horizon = horizon
        self._age = timedelta(seconds=horizon)
        self._elected = False
        self._newest = self._patrolled = _BEGINNING
        self._known: dict[tuple[str, UUID], Violation] = {}

    async def run(self, stopping: asyncio.Event) -> None:
        """Take turns until `stopping` is set."""
        self._elected = False
        connection = await connect(self._url, timeout=STATEMENT_SECONDS, application="orderflow auditor")
        try:
            # Statistics may be missing or old: without this a plan could read a whole table.
            await connection.execute("SET enable_seqscan = off")
            while not stopping.is_set():
                try:
                    await self.run_once(connection)
                except asyncpg.PostgresError as error:
                    if is_transient(error):
                        raise
                    # Not worth a publisher's life.
                    emit(PROCESS, "AUDIT_FAILED", error=f"{type(error).__name__}: {error}")
                with contextlib.suppress(TimeoutError):
                    await within(stopping.wait(), EVERY)
        finally:
            await close_connection(connection)

    @seam
    async def run_once(self, connection: asyncpg.Connection) -> int:
        """One turn; returns how many violations are known after it. A process that is not elected looks at nothing."""
        if not self._elected:
            self._elected = await connection.fetchval("SELECT pg_try_advisory_lock($1)", AUDITOR_LOCK)
        if not self._elected:
            if self._known:
                # Another process has been elected since, and shows them.
                self._note([], 0)
            return 0
        # Moved on before anything is checked: what makes a check fail must not be checked for ever.
        terminal = {*await self._next(connection), *await self._new(connection)}
        terminal |= {order_id for invariant, order_id in self._known if invariant != I6.name}
        waiting = {row["id"] for row in await connection.fetch(_LONGEST_IN_FLIGHT, self._age, MOST_IN_FLIGHT)}
        waiting |= {order_id for invariant, order_id in self._known if invariant == I6.name}
        found: list[Violation] = []
        if terminal or waiting:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                found += await violations_of(connection, OF_TERMINAL, list(terminal), reconcile_horizon=self._horizon)
                found += await violations_of(connection, (I6,), list(waiting), reconcile_horizon=self._horizon)
        checked = len(terminal) + len(waiting)
        self._health.audited = await audit_result.note(connection, checked, self._note(found, checked))
        return len(self._known)

    @seam
    async def _new(self, connection: asyncpg.Connection) -> list[UUID]:
        """Those that have become old enough since the last turn; of more than a window the newest, the rest is the patrol's."""
        rows = await connection.fetch(_NEWEST, self._age, *self._newest, WINDOW)
        if rows:
            self._newest = rows[0]["at"], rows[0]["id"]
        return [row["id"] for row in rows if row["judged"]]

    @seam
    async def _next(self, connection: asyncpg.Connection) -> list[UUID]:
        rows = await connection.fetch(_NEXT, self._age, *self._patrolled, WINDOW)
        self._patrolled = (rows[-1]["at"], rows[-1]["id"]) if len(rows) == WINDOW else _BEGINNING
        return [row["id"] for row in rows if row["judged"]]

    def _note(self, found: Sequence[Violation], checked: int) -> dict[str, int]:
        before, self._known = self._known, {}
        for violation in found[:MOST_KNOWN]:
            key = violation.invariant, violation.order_id
            if key not in before and key not in self._known:
                emit(
                    PROCESS, "AUDIT_VIOLATION", invariant=violation.invariant, orderId=violation.order_id,
                    violation=violation.example,
                )  # fmt: skip
            self._known[key] = violation
        counts = Counter(invariant for invariant, _ in self._known)
        violations = {invariant.name: counts[invariant.name] for invariant in (*OF_TERMINAL, I6)}
        emit(PROCESS, "AUDITED", orders=checked, violations=violations)
        return violations
