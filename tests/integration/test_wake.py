"""The wake-up: notified by anybody's commit, and back again after whatever happens to its connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.engine import seams
from orderflow.engine.wake import Wake
from tests.pipeline import watching
from tests.rows import insert_event

LIMIT = 30.0
PID = "SELECT pid FROM pg_stat_activity WHERE application_name = 'orderflow wake' AND datname = current_database()"


@asynccontextmanager
async def listening(url: str, heartbeat: float = 2.0, **pauses: float) -> AsyncIterator[tuple[Wake, asyncio.Event]]:
    event = asyncio.Event()
    wake = Wake(url, event, heartbeat=heartbeat, **pauses)
    task = asyncio.create_task(wake.run())
    try:
        await asyncio.wait_for(wake.listening.wait(), LIMIT)
        yield wake, event
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def woken(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), LIMIT)
    event.clear()


async def test_it_says_look_as_soon_as_it_listens_and_after_each_commit(
    connection: asyncpg.Connection, database_url: str
) -> None:
    async with listening(database_url) as (_, event):
        await woken(event)
        for _ in range(3):
            await insert_event(connection)
            await woken(event)


async def test_nothing_is_told_before_the_commit_nor_after_a_rollback(
    connection: asyncpg.Connection, database_url: str
) -> None:
    async with listening(database_url) as (_, event):
        await woken(event)
        transaction = connection.transaction()
        await transaction.start()
        await insert_event(connection)
        await transaction.rollback()
        # A notification of a later commit would come behind it.
        heard = asyncio.Event()
        await connection.add_listener("marker", lambda *_: heard.set())
        await connection.execute("NOTIFY marker")
        await asyncio.wait_for(heard.wait(), LIMIT)
        assert not event.is_set()


async def test_its_connection_is_ended_and_it_comes_back_and_says_look(
    connection: asyncpg.Connection, database_url: str
) -> None:
    with watching() as facts:
        async with listening(database_url) as (wake, event):
            for turn in range(1, 4):
                event.clear()
                await connection.execute("SELECT pg_terminate_backend($1)", await connection.fetchval(PID))
                # What was committed while nobody listened is found by looking.
                await woken(event)
                async with asyncio.timeout(LIMIT):
                    while not wake.listening.is_set() or wake.reconnects < turn:
                        await asyncio.sleep(0)
                event.clear()
                await insert_event(connection)
                await woken(event)
        assert len(facts.of("WAKE_LOST")) <= 3


async def test_the_server_is_frozen_and_the_heartbeat_finds_out(restartable_postgres: EmbeddedPostgres) -> None:
    # A half-open connection: it stays up, and nothing ever comes. TCP would not tell for minutes.
    with watching() as facts:
        async with listening(restartable_postgres.url, heartbeat=0.2) as (wake, event):
            event.clear()
            await restartable_postgres.pause()
            try:
                await facts.until("WAKE_LOST")
                assert not wake.listening.is_set()
            finally:
                await restartable_postgres.resume()
            await asyncio.wait_for(wake.listening.wait(), LIMIT)
            await woken(event)


async def test_lost_again_and_again_it_comes_back_as_fast_as_after_the_first_time(database_url: str) -> None:
    # A pause that grew with every loss would be minutes long in the end: who listened again begins with the first.
    disarm = seams.arm("wake._probe.before=raise")
    try:
        with watching() as facts:
            async with listening(database_url, heartbeat=0.1, pause=0.02, longest_pause=36_000.0):
                await facts.until("WAKE_LOST", count=14)
    finally:
        disarm()


async def test_the_server_is_restarted(restartable_postgres: EmbeddedPostgres) -> None:
    async with listening(restartable_postgres.url, heartbeat=0.5) as (wake, event):
        await restartable_postgres.kill()
        async with asyncio.timeout(LIMIT):
            while wake.reconnects < 1:
                await asyncio.sleep(0)
        await restartable_postgres.start()
        await asyncio.wait_for(wake.listening.wait(), LIMIT)
        event.clear()
        writer = await asyncpg.connect(restartable_postgres.url, timeout=10)
        try:
            await insert_event(writer)
            await woken(event)
        finally:
            await writer.close()


async def test_when_it_ends_its_connection_ends(connection: asyncpg.Connection, database_url: str) -> None:
    async with listening(database_url):
        assert await connection.fetchval(PID) is not None
    async with asyncio.timeout(LIMIT):
        while await connection.fetchval(PID) is not None:
            await asyncio.sleep(0)
