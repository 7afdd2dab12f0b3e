"""Where a promise is measured: one program at a time on servers of its own, its clients' record, and the audit at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from orderflow.bench import database
from orderflow.bench.load import Options, Summary
from orderflow.bench.program import Program, ProgramFailed
from orderflow.bench.sending import accepted_ids, send
from orderflow.bench.servers import Servers, Target
from orderflow.embedded.errors import EmbeddedError
from orderflow.torture.detour import Detour
from orderflow.torture.grounds import TRANSIENT

POLL = 0.02
PATIENCE = 120.0
# One process of each role.
SPLIT = ("--api", "1", "--publisher", "1", "--worker", "1")
# Of these orders, those that have not ended.
STILL = "SELECT count(*) FROM orders WHERE id = ANY($1) AND in_flight"


@dataclass(slots=True)
class Stage:
    """Servers, and on them one program at a time. `problems`: what the audit found after each."""

    servers: Servers
    directory: Path
    quick: bool = False
    problems: list[str] = field(default_factory=list)
    _count: int = 0

    @asynccontextmanager
    async def running(
        self, *processes: str, detour: Detour | None = None, settings: Mapping[str, str] | None = None
    ) -> AsyncIterator[Play]:
        """The program on a new database and topic; what it has left undone is settled and audited at the end."""
        self._count += 1
        async with self.servers.fresh() as target:
            environment = {**target.environment(), **(settings or {})}
            if detour is not None:
                assert self.servers.postgres is not None
                direct = target.database_url.replace(f":{self.servers.postgres.port}/", f":{detour.port}/")
                environment["ORDERFLOW_DATABASE_DIRECT_URL"] = direct
            program = Program(processes, environment, self.directory, name=f"promise-{self._count}")
            await program.start()
            play = Play(self, target, program, self.directory / f"accepted-{self._count}")
            play.record.touch()
            try:
                yield play
                await play.audit()
            finally:
                await play.close()
                await program.stop()


@dataclass(slots=True)
class Play:
    """One running program, its database, and the record of what its clients were told."""

    stage: Stage
    target: Target
    program: Program
    record: Path
    _connection: asyncpg.Connection | None = None

    async def ask(self, statement: str, *arguments: object) -> Any:
        """The first value of a statement; the connection is made again after a restart of the server."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await database.connected(self.target.database_url)
        return await self._connection.fetchval(statement, *arguments)

    async def none(self, statement: str, *arguments: object) -> bool:
        """Whether its first value is 0, or nothing."""
        return not await self.ask(statement, *arguments)

    async def at_least(self, statement: str, value: int) -> bool:
        """Whether its first value is."""
        return bool(await self.ask(statement) >= value)

    async def until(self, holds: Callable[[], Awaitable[bool]], *, patience: float = PATIENCE) -> float:
        """Wait for it; returns the Unix time at which it was seen. Raises TimeoutError."""
        async with asyncio.timeout(patience):
            while not await holds():  # noqa: ASYNC110  (what other processes do gives no signal here)
                await asyncio.sleep(POLL)
        return time.time()

    @asynccontextmanager
    async def load(self, *, rate: float, connections: int = 32) -> AsyncIterator[asyncio.Task[Summary]]:
        """Clients who do not give up, as long as the block lasts; the task's result tells what they came to."""
        enough = asyncio.Event()
        address = self.program.address
        options = Options(
            address.host, address.port, connections, 600.0, str(self.record), persistent=True, rate=rate, patience=60.0
        )
        task = asyncio.create_task(send(options, enough))
        try:
            yield task
        finally:
            enough.set()
            await asyncio.wait([task], timeout=PATIENCE)

    def facts(self, kind: str) -> int:
        """How many lines of that type the program has logged."""
        return sum(1 for line in self.program.log.read_text(errors="replace").splitlines() if f'"type":"{kind}"' in line)

    async def audit(self) -> None:
        """Wait until everything has ended, and note what is wrong."""
        connection = await database.connected(self.target.database_url)
        try:
            if not await database.until_settled(connection, timeout=PATIENCE):
                self.stage.problems.append(f"{self.program.log.name}: not settled after {PATIENCE:g} s")
            for finding in await database.audited(connection, accepted_ids(str(self.record))):
                if finding.violations:
                    self.stage.problems.append(f"{self.program.log.name}: {finding.invariant}: {finding.examples[0]}")
        finally:
            await connection.close(timeout=5)

    async def close(self) -> None:
        """End its connection."""
        if self._connection is not None and not self._connection.is_closed():
            await self._connection.close(timeout=5)


@dataclass(frozen=True, slots=True)
class Measured:
    """`value` in the promise's unit; `note`: what else was seen, and what bounds it."""

    value: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Promise:
    """`limit` is the most that was promised, in `unit`."""

    text: str
    limit: float
    unit: str
    measure: Callable[[Stage], Awaitable[Measured]]


async def measured(
    stage: Stage, promises: Sequence[Promise], tell: Callable[[float, str], None]
) -> list[tuple[Promise, Measured]]:
    """Each in turn. One that cannot be measured is among the stage's problems, and the others are measured all the same."""
    found = []
    for number, promise in enumerate(promises):
        tell(number / len(promises), promise.text)
        try:
            found.append((promise, await promise.measure(stage)))
        except (*TRANSIENT, EmbeddedError, ProgramFailed) as error:
            stage.problems.append(f"{promise.text}: not measured: {type(error).__name__}: {error}")
    return found
