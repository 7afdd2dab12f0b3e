"""Which relay publishes which shards: session advisory locks, so that one aggregate's events have one publisher at a time.

Every relay holds a shared lock as its sign of life; how many hold it says how many relays there are, and so what a fair share
is. A relay that dies loses its session, and with it both its sign and its shards, without anybody having to time it out.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from orderflow.engine.outbox import SHARDS
from orderflow.engine.patience import is_transient
from orderflow.engine.postgres import close_connection, connect
from orderflow.engine.seams import owning_seam, seam
from orderflow.engine.telemetry import PUBLISHER, emit

# First key of the two-key advisory locks: "of" and a purpose.
SHARD_LOCK = 0x6F66_0001
ALIVE_LOCK = 0x6F66_0002

_RELAYS = """
SELECT count(DISTINCT pid) FROM pg_locks
WHERE locktype = 'advisory' AND granted AND classid = $1 AND objid = 0 AND objsubid = 2
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

# LIMIT stops the scan at the last one wanted: a lock taken only to be given back would turn another relay away.
_TAKE = """
SELECT shard FROM unnest($2::integer[]) AS s(shard) WHERE pg_try_advisory_lock($1, shard) LIMIT $3
"""

_GIVE_BACK = "SELECT pg_advisory_unlock($1, shard) FROM unnest($2::integer[]) AS s(shard)"


def fair_share(relays: int, shards: int = SHARDS) -> int:
    """How many shards a relay may hold when `relays` of them are alive: enough that none is left over."""
    return -(-shards // max(1, relays))


class Shards:
    """The shards that this relay owns, held in a session of its own."""

    def __init__(self, url: str, *, timeout: float = 2.0) -> None:
        self._url = url
        self._timeout = timeout
        self._connection: asyncpg.Connection | None = None
        self._owned: set[int] = set()

    @property
    def owned(self) -> Sequence[int]:
        """The shards to publish now; empty from the moment in which the session is lost."""
        # Checked at each use: when the session ends, another relay may own them before we notice it otherwise.
        if self._connection is None or self._connection.is_closed():
            return ()
        return sorted(self._owned)

    @seam
    async def balance(self) -> bool:
        """Take free shards up to a fair share, give back what is over it. To be called between two rounds of publishing only.

        True when the set of shards has changed. Raises DependencyUnavailable or an asyncpg error when there can be no session.
        """
        before = set(self.owned)
        connection = await self._session()
        try:
            await self._share(connection)
        except Exception as error:
            # Half-open as a rule. It may hold its locks for a while yet; they are nobody's to publish until it ends.
            connection.terminate()
            if not is_transient(error):
                raise
            emit(PUBLISHER, "SHARDS_LOST", error=str(error) or type(error).__name__)
        return set(self.owned) != before

    @owning_seam
    async def _session(self) -> asyncpg.Connection:
        if self._connection is None or self._connection.is_closed():
            self._owned.clear()
            self._connection = await connect(self._url, timeout=self._timeout, application="orderflow shards")
            await self._connection.execute(f"SELECT pg_advisory_lock_shared({ALIVE_LOCK}, 0)")
        return self._connection

    @seam
    async def _share(self, connection: asyncpg.Connection) -> None:
        relays = int(await connection.fetchval(_RELAYS, ALIVE_LOCK))
        share = fair_share(relays)
        over = sorted(self._owned)[share:]
        if over:
            self._owned.difference_update(over)
            await connection.execute(_GIVE_BACK, SHARD_LOCK, over)
        elif len(self._owned) < share:
            free = [shard for shard in range(SHARDS) if shard not in self._owned]
            rows = await connection.fetch(_TAKE, SHARD_LOCK, free, share - len(self._owned))
            self._owned.update(row["shard"] for row in rows)

    @owning_seam
    async def close(self) -> None:
        """Give back everything at once by ending the session."""
        if self._connection is not None:
            await close_connection(self._connection)
            self._connection = None
            self._owned.clear()
