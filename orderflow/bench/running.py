"""A run beside which something happens: the program from its start to the audit, a load, and work done during it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import asyncpg

from orderflow.bench import database
from orderflow.bench.load import SLOT, Options, Summary
from orderflow.bench.program import Program, ProgramFailed
from orderflow.bench.sending import send
from orderflow.bench.servers import Target
from orderflow.bench.throughput import SETTLE_TIMEOUT, Audited, audit_run, paid_over_time, record_file

T = TypeVar("T")


class Run:
    """A program on one target, from its start to the audit of what it has written; made by `running`."""

    def __init__(self, target: Target, program: Program, connection: asyncpg.Connection, record: Path, since: datetime) -> None:
        self.target = target
        self.program = program
        self.connection = connection
        self._record = record
        self._since = since
        self._loads = 0

    async def load(self, seconds: float, connections: int) -> Summary:
        """Place orders in a closed loop for that long. Raises ProgramFailed."""
        self._loads += 1
        at = self.program.address
        return await send(Options(at.host, at.port, connections, seconds, str(self._record), seed=self._loads))

    async def warm_up(self, seconds: float, connections: int) -> None:
        """Connections, prepared statements and the consumer group's first assignment belong to the start."""
        await self.load(seconds, connections)
        if not await self.settled(SETTLE_TIMEOUT):
            raise ProgramFailed(f"the warm-up did not settle within {SETTLE_TIMEOUT:.0f} s: {self.program.log_tail()}")

    async def settled(self, timeout: float) -> bool:
        """Wait until everything is; False after `timeout` seconds."""
        return await database.until_settled(self.connection, timeout=timeout, since=self._since)

    async def paid(self, load: Summary) -> list[int]:
        """Orders that became PAID in each SLOT seconds since the first POST: from their own history, so it costs no run."""
        return await paid_over_time(self.connection, load.first_sent)

    async def end(self, name: str, load: Summary | None, *, timeout: float = SETTLE_TIMEOUT) -> Audited:
        """Stop the program when everything is settled, or after `timeout` seconds, and audit the database."""
        settled = await self.settled(timeout)
        code = await self.program.stop()
        audited = await audit_run(
            self.connection, name, self._record, settled=settled, code=code, load=load, since=self._since
        )  # fmt: skip
        self.program.log.unlink(missing_ok=True)
        return audited


@asynccontextmanager
async def running(target: Target, directory: Path, arguments: Sequence[str], settings: Mapping[str, str]) -> AsyncIterator[Run]:
    """`orderflow run` with these arguments and settings against that target. Raises EmbeddedError, ProgramFailed."""
    record = record_file(directory, target)
    connection = await database.connected(target.database_url)
    try:
        since = await connection.fetchval("SELECT now()")
        program = Program(arguments, settings, directory, name=record.stem)
        await program.start()
        try:
            yield Run(target, program, connection, record, since)
        finally:
            await program.stop()
    finally:
        await connection.close(timeout=5)


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Have `work` done during the block; what is not done at its end is cancelled."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def rate(paid: Sequence[int], begin: float, end: float) -> float:
    """Orders a second between two times in seconds since the first POST, to the nearest slots and over one at least."""
    first = max(0, round(begin / SLOT))
    last = max(first + 1, round(end / SLOT))
    return sum(paid[first:last]) / ((last - first) * SLOT)
