"""PostgreSQL connections with every timeout set."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from orderflow.engine.patience import database_error, within

Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy

# A plan that is made while a table is small, or before its first ANALYZE, reads all of it, and a prepared statement keeps it
# while the table grows. What these sessions ask names its rows by key: each is one probe of an index, and as no argument makes
# another plan the better one, none of them is planned twice (which costs a single order more than its statements do).
_BY_INDEX = {
    "enable_seqscan": "off", "enable_bitmapscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off",
    "plan_cache_mode": "force_generic_plan",
}  # fmt: skip

# A client that vanished without a word keeps its advisory locks for as long as the server believes in it: ten seconds here.
_SERVER_KEEPS_ALIVE = {
    "tcp_keepalives_idle": "4", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "3", "tcp_user_timeout": "10000",
}  # fmt: skip


class Database:
    """A pool whose every wait is bounded: `timeout` seconds to connect, to acquire, and for one statement."""

    def __init__(self, pool: asyncpg.Pool, timeout: float) -> None:
        self.pool = pool
        self.timeout = timeout

    @classmethod
    async def open(
        cls, url: str, *, size: int, timeout: float, application: str = "orderflow", statement_cache: int = 256,
        by_index: bool = False,
    ) -> Database:  # fmt: skip
        """Connect at most `size` times. `by_index`: for sessions whose every statement has an index to go by.

        Raises DependencyUnavailable or Misconfigured with a line for people when the server cannot be used.
        """
        try:
            pool = await within(
                asyncpg.create_pool(
                    url, min_size=1, max_size=size, timeout=timeout, command_timeout=timeout,
                    init=_keep_alive, reset=_nothing_to_reset,
                    max_inactive_connection_lifetime=60.0, statement_cache_size=statement_cache,
                    server_settings=_session(application, timeout) | (_BY_INDEX if by_index else {}),
                ),
                timeout * 2,
            )  # fmt: skip
        except Exception as error:
            raise database_error(url, error) from error
        return cls(pool, timeout)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """A connection of the pool; TimeoutError when none comes free in time."""
        async with self.pool.acquire(timeout=self.timeout) as connection:
            try:
                yield connection
            except asyncpg.ReadOnlySQLTransactionError:
                # After a failover the pool still holds connections to what is now a standby.
                await self.pool.expire_connections()
                raise

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection inside a transaction, committed when the block ends without an error."""
        async with self.acquire() as connection, connection.transaction():
            yield connection

    async def fetch(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        """All rows of one statement."""
        async with self.acquire() as connection:
            return await connection.fetch(query, *arguments)

    async def fetchrow(self, query: str, *arguments: Any) -> asyncpg.Record | None:
        """The first row of one statement, or None."""
        async with self.acquire() as connection:
            return await connection.fetchrow(query, *arguments)

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        """The first column of the first row of one statement, or None."""
        async with self.acquire() as connection:
            return await connection.fetchval(query, *arguments)

    async def close(self, timeout: float = 2.0) -> None:
        """Close within `timeout` seconds: a close into a black hole hangs in asyncpg (#1326), so it is ended by force."""
        try:
            await within(self.pool.close(), timeout)
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self.pool.terminate()


async def connect(url: str, *, timeout: float, application: str) -> asyncpg.Connection:
    """One connection of its own, for what is bound to a session (LISTEN, advisory locks).

    Raises DependencyUnavailable or Misconfigured with a line for people when the server cannot be used.
    """
    try:
        connection = await asyncpg.connect(
            url, timeout=timeout, command_timeout=timeout, statement_cache_size=0,
            server_settings={"application_name": application, **_SERVER_KEEPS_ALIVE},
        )  # fmt: skip
    except Exception as error:
        raise database_error(url, error) from error
    await _keep_alive(connection)
    return connection


async def close_connection(connection: asyncpg.Connection, timeout: float = 1.0) -> None:
    """Close within `timeout` seconds, by force if need be."""
    try:
        await within(connection.close(), timeout)
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection.terminate()


async def _keep_alive(connection: Connection) -> None:
    """asyncpg sets no keepalive (#519): a connection whose peer vanished would be believed alive for hours."""
    transport = getattr(connection, "_transport", None)
    sock = transport.get_extra_info("socket") if transport else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _nothing_to_reset(connection: Connection) -> None:
    """asyncpg clears a session at each release, a round trip; nothing here leaves anything in a pooled session."""


def _session(application: str, timeout: float) -> dict[str, str]:
    """The server itself ends what the client gave up on, so that no lock outlives its owner."""
    milliseconds = str(int(timeout * 1000))
    return {
        "application_name": application,
        "statement_timeout": milliseconds,
        "lock_timeout": milliseconds,
        "idle_in_transaction_session_timeout": str(int(timeout * 2000)),
        "jit": "off",
    }
