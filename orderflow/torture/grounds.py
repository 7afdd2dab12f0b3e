"""What the faults of one run can reach: its servers, its processes, and the addresses of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from orderflow.bench.exchange import Address
from orderflow.embedded.kafka import ApacheKafka
from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.torture.detour import Detour
from orderflow.torture.plan import Fault
from orderflow.torture.victims import Victims

STATEMENT_TIMEOUT = 30.0
# A PostgreSQL that another fault has taken away is waited for.
BACK_TIMEOUT = 120.0
BACK_POLL = 0.1
TRANSIENT = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)
NOBODY = "nobody was there to hit"

# Does a fault, undoes it after its time, and says whom it met.
Action = Callable[[Fault], Awaitable[str]]


@dataclass(slots=True)
class Grounds:
    """`kafka` is None with the broker of `dev`, and so is `kafka_detour`, the program's way to it.

    `limited`: a directory on a file system that can be filled, or None. `records`: the files of accepted ids that faults have
    placed orders into.
    """

    postgres: EmbeddedPostgres
    kafka: ApacheKafka | None
    bootstrap: str
    topic: str
    group: str
    database: str
    address: Address
    victims: Victims
    detour: Detour
    directory: Path
    limited: Path | None = None
    records: list[Path] = field(default_factory=list)
    kafka_detour: Detour | None = None

    async def _connect(self) -> asyncpg.Connection:
        end = time.monotonic() + BACK_TIMEOUT
        while True:
            try:
                return await self.postgres.connect(self.database)
            except TRANSIENT:
                if time.monotonic() >= end:
                    raise
                await asyncio.sleep(BACK_POLL)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[asyncpg.Connection]:
        """A superuser's own connection. Raises what connecting raises when PostgreSQL does not come back."""
        connection = await self._connect()
        try:
            yield connection
        finally:
            await connection.close(timeout=STATEMENT_TIMEOUT)

    async def fetch(self, statement: str, *arguments: object) -> list[Any]:
        """All rows of one statement, which may be carried out twice: another fault may cut its connection."""
        end = time.monotonic() + BACK_TIMEOUT
        while True:
            try:
                async with self.connected() as connection:
                    return await connection.fetch(statement, *arguments, timeout=STATEMENT_TIMEOUT)
            except TRANSIENT:
                if time.monotonic() >= end:
                    raise
                await asyncio.sleep(BACK_POLL)

    async def ask(self, statement: str, *arguments: object) -> Any:
        """The first value of such a statement."""
        rows = await self.fetch(statement, *arguments)
        return rows[0][0] if rows else None
