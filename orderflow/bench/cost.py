"""What PostgreSQL did for an order, by its own counters: bytes of its log, commits, fsyncs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import asyncpg

# Of the whole server: nothing else runs on ours. PostgreSQL 18 counts the log's fsyncs in another view.
_LOG = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
_COMMITS = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
_FSYNCS = "SELECT wal_sync FROM pg_stat_wal"
_FSYNCS_18 = "SELECT sum(fsyncs)::bigint FROM pg_stat_io WHERE object = 'wal'"
PG_18 = 180_000


@dataclass(frozen=True, slots=True)
class Counters:
    """At one moment; `fsyncs` is None where this user may not read it."""

    wal_bytes: int
    commits: int
    fsyncs: int | None

    @classmethod
    async def read(cls, connection: asyncpg.Connection) -> Self:
        """Complete only when nobody else is connected: a session tells of its work once a second, and when it ends."""
        version = int(await connection.fetchval("SHOW server_version_num"))
        try:
            fsyncs = await connection.fetchval(_FSYNCS_18 if version >= PG_18 else _FSYNCS)
        except asyncpg.InsufficientPrivilegeError:
            fsyncs = None
        return cls(int(await connection.fetchval(_LOG)), int(await connection.fetchval(_COMMITS)), fsyncs)


@dataclass(frozen=True, slots=True)
class Cost:
    """For one order, the warm-up's and the program's start included."""

    wal_bytes: float
    commits: float
    fsyncs: float | None

    @classmethod
    def between(cls, before: Counters, after: Counters, *, orders: int, ours: int) -> Self:
        """For each of so many orders; `ours` are the measuring side's own commits among them."""
        orders = max(1, orders)
        fsyncs = None if before.fsyncs is None or after.fsyncs is None else (after.fsyncs - before.fsyncs) / orders
        commits = max(0, after.commits - before.commits - ours)
        return cls((after.wal_bytes - before.wal_bytes) / orders, commits / orders, fsyncs)
