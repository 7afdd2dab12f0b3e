"""Faults of PostgreSQL: restarts and kills, lost and half-open connections, and everything that it can refuse."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress

import asyncpg

from orderflow.torture.grounds import NOBODY, STATEMENT_TIMEOUT, Action, Grounds
from orderflow.torture.plan import Fault, Kind
from orderflow.torture.process_faults import VICTIM_POLL, VICTIM_TIMEOUT, send
from orderflow.torture.victims import descendants

PAIR = 2
CANCEL_EVERY = 0.01

_TERMINATE_ALL = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
_TERMINATE_LISTEN = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'orderflow wake'
"""
_BACKENDS = """
SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
_CANCEL = """
SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND state = 'active' AND pid <> pg_backend_pid() AND datname = current_database()
"""
_LOCK_ORDERS = "LOCK TABLE orders IN ACCESS EXCLUSIVE MODE"
_IN_FLIGHT = "SELECT id FROM orders WHERE in_flight ORDER BY random() LIMIT $1"
_LOCK_ROW = "SELECT FROM orders WHERE id = $1 FOR UPDATE"


class PostgresFaults:
    """`actions`: by kind. Those that stop or change the whole server wait for each other."""

    def __init__(self, grounds: Grounds) -> None:
        self._grounds = grounds
        self._postgres = grounds.postgres
        self._turn = asyncio.Lock()
        self.actions: Mapping[Kind, Action] = {
            Kind.POSTGRES_FAST: lambda fault: self._restart(lambda: self._postgres.restart("fast")),
            Kind.POSTGRES_IMMEDIATE: lambda fault: self._restart(lambda: self._postgres.restart("immediate")),
            Kind.POSTGRES_KILL: lambda fault: self._restart(self._kill_postmaster),
            Kind.POSTGRES_PAUSE: self._pause,
            Kind.BACKEND_KILL: self._kill_backend,
            Kind.TERMINATE_ALL: lambda fault: self._terminate(_TERMINATE_ALL),
            Kind.TERMINATE_LISTEN: self._terminate_listen,
            Kind.HALF_OPEN: self._half_open,
            Kind.NO_CONNECTION_LEFT: self._take_connections,
            Kind.READ_ONLY: lambda fault: self._with_setting("default_transaction_read_only", "on", fault),
            Kind.STATEMENTS_CANCELLED: self._cancel_statements,
            Kind.SERIALIZABLE: lambda fault: self._with_setting("default_transaction_isolation", "serializable", fault),
            Kind.DISK_FULL: self._fill_disk,
            Kind.ORDERS_LOCKED: self._lock_orders,
            Kind.DEADLOCKS: self._deadlocks,
        }

    async def ask(self, statement: str, *arguments: object) -> object:
        """A statement that no restart of ours interrupts."""
        async with self._turn:
            return await self._grounds.ask(statement, *arguments)

    async def _restart(self, restart: Callable[[], Awaitable[None]]) -> str:
        async with self._turn:
            begun = time.monotonic()
            await restart()
            return f"back after {time.monotonic() - begun:.1f} s"

    async def _kill_postmaster(self) -> None:
        # The postmaster alone: its backends find out by themselves, and the next start has to wait for the last of them.
        os.kill(self._postgres.pid, signal.SIGKILL)
        await self._postgres.wait()
        await self._postgres.stop()
        await self._postgres.start()

    async def _pause(self, fault: Fault) -> str:
        async with self._turn:
            # The postmaster first: whom it has not started by then it does not start.
            send(self._postgres.pid, signal.SIGSTOP)
            stopped = [pid for pid in await descendants(self._postgres.pid) if send(pid, signal.SIGSTOP)]
            try:
                await asyncio.sleep(fault.lasts)
            finally:
                for pid in (*stopped, self._postgres.pid):
                    send(pid, signal.SIGCONT)
            return f"{len(stopped) + 1} processes"

    async def _kill_backend(self, fault: Fault) -> str:
        async with self._turn:
            backends = await self._grounds.ask(_BACKENDS)
            if not backends or not send(pid := backends[fault.pick % len(backends)], signal.SIGKILL):
                return NOBODY
            # The postmaster takes all others down and recovers.
            begun = time.monotonic()
            await self._grounds.ask("SELECT 1")
            return f"pid {pid}, back after {time.monotonic() - begun:.1f} s"

    async def _terminate(self, statement: str) -> str:
        return f"{await self.ask(statement)} connections"

    async def _terminate_listen(self, fault: Fault) -> str:
        end = time.monotonic() + VICTIM_TIMEOUT
        # After another fault the publisher may be about to connect again.
        while not (hit := await self.ask(_TERMINATE_LISTEN)):
            if time.monotonic() >= end:
                return NOBODY
            await asyncio.sleep(VICTIM_POLL)
        return f"{hit} connections"

    async def _half_open(self, fault: Fault) -> str:
        hit = self._grounds.detour.swallow()
        await asyncio.sleep(fault.lasts)
        return f"{hit} connections"

    async def _take_connections(self, fault: Fault) -> str:
        taken: list[asyncpg.Connection] = []
        async with self._turn:
            try:
                with suppress(asyncpg.TooManyConnectionsError, TimeoutError, OSError):
                    while True:
                        taken.append(await asyncpg.connect(self._postgres.url, timeout=STATEMENT_TIMEOUT))
                await asyncio.sleep(fault.lasts)
            finally:
                await asyncio.gather(*(connection.close(timeout=5) for connection in taken), return_exceptions=True)
        return f"{len(taken)} taken"

    async def _with_setting(self, name: str, value: str, fault: Fault) -> str:
        async with self._turn:
            try:
                await self._set(f"ALTER SYSTEM SET {name} = '{value}'")
                await asyncio.sleep(fault.lasts)
            finally:
                await self._set(f"ALTER SYSTEM RESET {name}")
        return f"{name} {value}"

    async def _set(self, statement: str) -> None:
        await self._grounds.ask(statement)
        await self._grounds.ask("SELECT pg_reload_conf()")

    async def _cancel_statements(self, fault: Fault) -> str:
        end, hit = time.monotonic() + fault.lasts, 0
        async with self._turn, self._grounds.connected() as connection:
            while time.monotonic() < end:
                hit += await connection.fetchval(_CANCEL)
                await asyncio.sleep(CANCEL_EVERY)
        return f"{hit} statements"

    async def _fill_disk(self, fault: Fault) -> str:
        limited = self._grounds.limited
        assert limited is not None
        ballast = limited / "ballast"
        async with self._turn:
            try:
                state = os.statvfs(limited)
                with ballast.open("wb") as file, suppress(OSError):
                    await asyncio.to_thread(os.posix_fallocate, file.fileno(), 0, state.f_bavail * state.f_frsize)
                await asyncio.sleep(fault.lasts)
            finally:
                ballast.unlink(missing_ok=True)
        return f"{state.f_bavail * state.f_frsize / 2**20:,.0f} MiB taken"

    async def _lock_orders(self, fault: Fault) -> str:
        async with self._turn, self._transaction() as connection:
            await connection.execute(_LOCK_ORDERS, timeout=STATEMENT_TIMEOUT)
            await asyncio.sleep(fault.lasts)
        return "ACCESS EXCLUSIVE"

    async def _deadlocks(self, fault: Fault) -> str:
        """Lock pairs of orders in flight, each pair in both orders at once, while the program updates them in groups."""
        end, met = time.monotonic() + fault.lasts, 0
        async with self._turn:
            while time.monotonic() < end:
                found = await asyncio.gather(*(self._lock_pair() for _ in range(4)), return_exceptions=True)
                met += sum(isinstance(error, asyncpg.DeadlockDetectedError) for error in found)
        return f"{met} deadlocks were ours"

    async def _lock_pair(self) -> None:
        async with self._transaction() as connection:
            for row in await connection.fetch(_IN_FLIGHT, PAIR):
                await connection.execute(_LOCK_ROW, row["id"])
                await asyncio.sleep(0.05)

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[asyncpg.Connection]:
        async with self._grounds.connected() as connection, connection.transaction():
            yield connection
