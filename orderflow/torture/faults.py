"""Each fault of a plan, done to the processes and servers of one run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg

from orderflow.embedded.kafka import ApacheKafka
from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.settings import Role
from orderflow.torture.plan import Fault, Kind
from orderflow.torture.victims import Victim, Victims

NOBODY = "nobody was there to hit"
STATEMENT_TIMEOUT = 30.0
VICTIM_TIMEOUT = 5.0
VICTIM_POLL = 0.1
ROLE_OF: dict[Kind, Role] = {Kind.KILL_API: "api", Kind.KILL_PUBLISHER: "publisher", Kind.KILL_WORKER: "worker"}

_TERMINATE_ALL = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
_TERMINATE_LISTEN = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'orderflow wake'
"""
_SET_MODE = """
INSERT INTO gateway_control (mode) VALUES ($1)
ON CONFLICT (only_row) DO UPDATE SET mode = excluded.mode, changed_at = now()
"""


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that was done: `began` and `ended` are seconds from the start of the load, `what` says whom it met."""

    fault: Fault
    began: float
    ended: float
    what: str


class Faults:
    """Does what a plan says. Faults of one server wait for each other; everything else overlaps as the plan has it."""

    def __init__(self, postgres: EmbeddedPostgres, kafka: ApacheKafka | None, database: str, victims: Victims) -> None:
        self._postgres = postgres
        self._kafka = kafka
        self._database = database
        self._victims = victims
        self._postgres_turn = asyncio.Lock()
        self._kafka_turn = asyncio.Lock()
        self._gateway_turn = asyncio.Lock()

    async def inject(self, fault: Fault, load_began: float) -> Injected:
        """Do it, and undo it after its time; `load_began` is monotonic.

        Raises EmbeddedError when a server does not come back.
        """
        began = time.monotonic()
        what = await self._action(fault)()
        return Injected(fault, began - load_began, time.monotonic() - load_began, what)

    def _action(self, fault: Fault) -> Callable[[], Awaitable[str]]:
        match fault.kind:
            case Kind.KILL_API | Kind.KILL_PUBLISHER | Kind.KILL_WORKER:
                return lambda: self._kill(ROLE_OF[fault.kind], fault.pick)
            case Kind.PAUSE_WORKER:
                return lambda: self._pause(fault)
            case Kind.POSTGRES_FAST:
                return lambda: self._restart_postgres(lambda: self._postgres.restart("fast"))
            case Kind.POSTGRES_IMMEDIATE:
                return lambda: self._restart_postgres(lambda: self._postgres.restart("immediate"))
            case Kind.POSTGRES_KILL:
                return lambda: self._restart_postgres(self._kill_postmaster)
            case Kind.TERMINATE_ALL:
                return lambda: self._terminate(_TERMINATE_ALL)
            case Kind.TERMINATE_LISTEN:
                return self._terminate_listen
            case Kind.KAFKA_RESTART | Kind.KAFKA_KILL:
                return lambda: self._restart_kafka(killed=fault.kind is Kind.KAFKA_KILL)
            case Kind.GATEWAY_ERROR | Kind.GATEWAY_TIMEOUT | Kind.GATEWAY_HANG:
                return lambda: self._gateway(fault)

    async def _kill(self, role: Role, pick: int) -> str:
        victim = await self._chosen(role, pick)
        return str(victim) if victim and _signal(victim.pid, signal.SIGKILL) else NOBODY

    async def _pause(self, fault: Fault) -> str:
        victim = await self._chosen("worker", fault.pick)
        if victim is None or not _signal(victim.pid, signal.SIGSTOP):
            return NOBODY
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            # Another fault may have killed it meanwhile.
            if await self._victims.still(victim):
                _signal(victim.pid, signal.SIGCONT)
        return str(victim)

    async def _chosen(self, role: Role, pick: int) -> Victim | None:
        """One of the role's processes; waits a moment for one that the parent is about to start again."""
        end = time.monotonic() + VICTIM_TIMEOUT
        while not (alive := await self._victims.of(role)):
            if time.monotonic() >= end:
                return None
            await asyncio.sleep(VICTIM_POLL)
        return alive[pick % len(alive)]

    async def _restart_postgres(self, restart: Callable[[], Awaitable[None]]) -> str:
        async with self._postgres_turn:
            begun = time.monotonic()
            await restart()
            return f"back after {time.monotonic() - begun:.1f} s"

    async def _kill_postmaster(self) -> None:
        # The postmaster alone: its backends find out by themselves, and the next start has to wait for the last of them.
        os.kill(self._postgres.pid, signal.SIGKILL)
        await self._postgres.wait()
        await self._postgres.stop()
        await self._postgres.start()

    async def _restart_kafka(self, *, killed: bool) -> str:
        assert self._kafka is not None
        async with self._kafka_turn:
            begun = time.monotonic()
            await (self._kafka.kill() if killed else self._kafka.stop())
            down = time.monotonic()
            await self._kafka.start()
            return f"down after {down - begun:.1f} s, back after {time.monotonic() - begun:.1f} s"

    async def _terminate(self, statement: str) -> str:
        async with self._postgres_turn:
            return f"{await self._ask(statement)} connections"

    async def _terminate_listen(self) -> str:
        async with self._postgres_turn:
            end = time.monotonic() + VICTIM_TIMEOUT
            # After another fault the publisher may be about to connect again.
            while not (hit := await self._ask(_TERMINATE_LISTEN)):
                if time.monotonic() >= end:
                    return NOBODY
                await asyncio.sleep(VICTIM_POLL)
            return f"{hit} connections"

    async def _gateway(self, fault: Fault) -> str:
        mode = fault.kind.removeprefix("gateway mode ")
        async with self._gateway_turn:
            try:
                await self._set_mode(mode)
                await asyncio.sleep(fault.lasts)
            finally:
                await self._set_mode("random")
        return "then random again"

    async def _set_mode(self, mode: str) -> None:
        async with self._postgres_turn:
            await self._ask(_SET_MODE, mode)

    async def _ask(self, statement: str, *arguments: object) -> object:
        connection: asyncpg.Connection = await self._postgres.connect(self._database)
        try:
            return await connection.fetchval(statement, *arguments, timeout=STATEMENT_TIMEOUT)
        finally:
            await connection.close(timeout=STATEMENT_TIMEOUT)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
