"""What the continuous auditor has found last: noted by the elected process in one row, and shown by every process's /readyz.

The row is read only when somebody asks, and once in a few seconds at the most: an idle process runs no statement for it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import Any, Final

import asyncpg
import orjson

from orderflow.engine.patience import Misconfigured, is_transient
from orderflow.engine.postgres import close_connection, connect
from orderflow.engine.seams import seam
from orderflow.health import POSTGRES, Health

# Who asks more often gets the same answer, whatever he asks: /readyz is open to anybody.
FRESH_SECONDS: Final = 5.0
# What an answer of /readyz waits for it, and what the look may take by itself.
PATIENCE_SECONDS: Final = 0.5
TIMEOUT_SECONDS: Final = 2.0

_NOTE: Final = """
INSERT INTO audit_result (process, orders, violations) VALUES ($1, $2, $3::text::jsonb)
ON CONFLICT (only_row) DO UPDATE SET audited_at = now(), process = excluded.process, orders = excluded.orders,
                                     violations = excluded.violations
RETURNING audited_at, process, orders, violations::text
"""
_LATEST: Final = "SELECT audited_at, process, orders, violations::text FROM audit_result"


@seam
async def note(connection: asyncpg.Connection, orders: int, violations: Mapping[str, int]) -> dict[str, Any]:
    """Put this result in the place of the one before; returns it as /readyz shows it. For the elected process alone."""
    process = f"{os.getpid()}@{socket.gethostname()}"
    row = await connection.fetchrow(_NOTE, process, orders, orjson.dumps(violations).decode())
    assert row is not None
    return _shown(row)


@seam
async def latest(connection: asyncpg.Connection) -> dict[str, Any] | None:
    """The result that was noted last, as /readyz shows it; None before the first."""
    row = await connection.fetchrow(_LATEST)
    return _shown(row) if row is not None else None


def _shown(row: asyncpg.Record) -> dict[str, Any]:
    violations: dict[str, int] = orjson.loads(row["violations"])
    return {
        "violations": sum(violations.values()), "byInvariant": violations, "orders": row["orders"], "at": row["audited_at"],
        "process": row["process"],
    }  # fmt: skip


class LatestAudit:
    """Brings the latest result to this process's health when somebody asks for it."""

    def __init__(self, direct_url: str, health: Health) -> None:
        self._url = direct_url
        self._health = health
        self._look: asyncio.Task[None] | None = None
        self._since = 0.0

    async def refresh(self) -> None:
        """Look, unless somebody has a moment ago, or PostgreSQL is away. What is not had in half a second stays as it was."""
        if not self._health.reaches(POSTGRES):
            return
        now = asyncio.get_running_loop().time()
        if self._look is None or (self._look.done() and now - self._since >= FRESH_SECONDS):
            self._since = now
            self._look = asyncio.create_task(self._read(), name="latest audit")
        # Not cancelled after that: the next who asks has it.
        await asyncio.wait({self._look}, timeout=PATIENCE_SECONDS)

    async def _read(self) -> None:
        try:
            connection = await connect(self._url, timeout=TIMEOUT_SECONDS, application="orderflow readyz")
            try:
                found = await latest(connection)
            finally:
                await close_connection(connection)
        except (asyncpg.PostgresError, Misconfigured):
            # Neither a right that is missing nor a full server makes this process unready, and others tell of them.
            return
        except Exception as error:
            if not is_transient(error):
                raise
            return
        if found is not None:
            self._health.audited = found
