"""`orderflow dev` as a person uses it: killed in the middle and started again, and twice at once."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from tests.fleet import Client, Process, api_of
from tests.rows import settled, violations
from tests.servers import is_gone, scratch_directory
from tests.waiting import eventually

SLOW = {"ORDERFLOW_GATEWAY_DELAY_MS": "30000", "ORDERFLOW_GATEWAY_TIMEOUT_MS": "60000"}
QUICK = {"ORDERFLOW_GATEWAY_DELAY_MS": "20"}


@asynccontextmanager
async def dev(directory: Path, **environment: str) -> AsyncIterator[Process]:
    process = await Process.start(
        "dev", "--data-dir", str(directory), environment={"ORDERFLOW_LOG_FORMAT": "json", **environment}
    )
    try:
        yield process
    finally:
        await process.close()


def server_of(directory: Path) -> int:
    """The process id of the PostgreSQL that works on this data."""
    return int((directory / "postgresql" / "pgdata" / "postmaster.pid").read_text().splitlines()[0])


def database_of(process: Process) -> str:
    """Where the welcome says that the database is."""
    found = re.search(r"PostgreSQL\s+(postgresql://\S+)", "\n".join(process.errors))
    assert found, process.errors
    return found[1]


async def test_orders_in_flight_end_after_a_kill_and_no_process_is_left() -> None:
    client = Client()
    with scratch_directory() as directory:
        async with dev(directory, **SLOW) as first:
            await client.place_many(await api_of(first), 5)
            await first.facts.until("STATE_CHANGE", count=5)
            server = server_of(directory)
            first.kill()
        await eventually(lambda: is_gone(server), timeout=30)

        async with dev(directory, **QUICK) as second:
            await api_of(second)
            # The broker has forgotten everything; the outbox has not.
            connection = await asyncpg.connect(database_of(second))
            try:
                await settled(connection)
                assert await violations(connection, client.accepted) == {}
            finally:
                await connection.close()
            server = server_of(directory)
            second.process.send_signal(signal.SIGINT)
            assert await second.end() == 0
            assert is_gone(server)


async def test_two_at_once_in_two_directories() -> None:
    with scratch_directory() as one, scratch_directory() as other:
        async with dev(one, **QUICK) as first, dev(other, **QUICK) as second:
            addresses = [await api_of(first), await api_of(second)]
            assert addresses[0] != addresses[1]
            await asyncio.gather(*(Client().place_many(address, 2) for address in addresses))
            for process in (first, second):
                await process.facts.until("PAYMENT_RESULT", count=2)
                process.process.send_signal(signal.SIGINT)
                assert await process.end() == 0


async def test_the_same_directory_twice_is_refused() -> None:
    with scratch_directory() as directory:
        async with dev(directory, **QUICK) as first:
            await api_of(first)
            async with dev(directory, **QUICK) as second:
                assert await second.end() == 1
                assert "already running here" in "\n".join(second.errors)
