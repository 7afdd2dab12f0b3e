"""T13, T15: what a program with all roles costs while nothing happens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from orderflow.bench import database
from orderflow.bench.program import Program
from orderflow.bench.running import running
from orderflow.bench.servers import Servers
from orderflow.bench.throughput import Audited, paying_settings
from orderflow.bench.usage import Meter, resident, server_roots

WARM_UP_CONNECTIONS = 8
VACUUM_TIMEOUT = 60.0
# Long enough for all that a start leaves to be done once it is ready.
STARTED_SECONDS = 2.0

_TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
_STATEMENTS = """
SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements
WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@dataclass(frozen=True, slots=True)
class Idle:
    """An idle `orderflow run`. Shares are of one core (1.0 is a whole one), the servers' by their names.

    `counted` says what `statements_per_second` counts: statements, where pg_stat_statements may be read; else transactions,
    which are fewer where one has several statements. `resident_bytes` counts the pages that the process shares with others
    in full (RSS), `proportional_bytes` its share of them (PSS). Off Linux only the statements are known, the rest is 0.
    """

    cpu_share: float
    server_cpu_shares: dict[str, float]
    statements_per_second: float
    counted: str
    resident_bytes: int
    proportional_bytes: int
    audited: Audited


async def measure(servers: Servers, directory: Path, *, seconds: float, warm_up: float = 1.0) -> Idle:
    """All roles in one process: `warm_up` seconds of orders, then nothing for `seconds`.

    The statements are counted in two more runs, one longer than the other by `seconds`, whose difference leaves start and stop
    out: a session that reads no table tells of its transactions only when it ends. Raises EmbeddedError, ProgramFailed.
    """
    async with servers.fresh() as target:
        settings = paying_settings(target, delay_ms=0)
        connection = await database.connected(target.database_url)
        try:
            # First, while autovacuum finds nothing to do: its transactions would count.
            counted, count = await _counter(connection)
            short = await _counts(connection, count, settings, directory, STARTED_SECONDS)
            long = await _counts(connection, count, settings, directory, STARTED_SECONDS + seconds)
        finally:
            await connection.close(timeout=5)
        async with running(target, directory, (), settings) as run:
            await run.warm_up(warm_up, WARM_UP_CONNECTIONS)
            # What autovacuum would do about the warm-up, in the midst of what is measured.
            await run.connection.execute("VACUUM (ANALYZE)", timeout=VACUUM_TIMEOUT)
            meter = Meter({"orderflow": run.program.pid, **server_roots(servers)})
            meter.start()
            await asyncio.sleep(seconds)
            shares = {usage.name: usage.cpu_seconds / seconds for usage in await meter.stop()}
            rss, pss = resident(run.program.pid)
            audited = await run.end(f"idle for {seconds:g} s", None)
    return Idle(shares.pop("orderflow", 0.0), shares, max(0, long - short) / seconds, counted, rss, pss, audited)


async def _counter(connection: asyncpg.Connection) -> tuple[str, str]:
    """What can be counted here, and the statement that tells how many there were."""
    try:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        await connection.fetchval(_STATEMENTS)
    except asyncpg.PostgresError:
        return "transactions", _TRANSACTIONS
    return "statements", _STATEMENTS


async def _counts(
    connection: asyncpg.Connection, count: str, settings: Mapping[str, str], directory: Path, seconds: float
) -> int:
    """How many there are from the start of a program to its end, with `seconds` between."""
    await database.until_alone(connection)
    before = int(await connection.fetchval(count))
    program = Program((), settings, directory, name=f"idle-{seconds:g}")
    try:
        await program.start()
        await asyncio.sleep(seconds)
    finally:
        await program.stop()
    await database.until_alone(connection)
    return int(await connection.fetchval(count)) - before
