"""The torture's way to a server: it passes on what comes, and when it swallows, neither side is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import asyncpg
import pytest

from orderflow.embedded.kafka import ApacheKafka
from orderflow.torture.detour import Detour
from tests.integration.test_relay import Restarted, all_published, relay_on
from tests.pipeline import running, watching
from tests.rows import insert_event
from tests.servers import choose_broker, scratch_directory
from tests.topics import records_in
from tests.waiting import eventually

SILENCE = 0.3


@pytest.fixture
async def detour(database_url: str) -> AsyncIterator[Detour]:
    detour = Detour(int(urlsplit(database_url).port or 5432))
    await detour.start()
    yield detour
    await detour.stop()


def through(detour: Detour, url: str) -> str:
    return url.replace(f":{urlsplit(url).port}/", f":{detour.port}/")


async def test_what_comes_is_passed_on(detour: Detour, database_url: str) -> None:
    connection = await asyncpg.connect(through(detour, database_url))
    assert await connection.fetchval("SELECT 42") == 42
    await connection.close()


async def test_a_half_open_connection_is_silent_and_others_pass(detour: Detour, database_url: str) -> None:
    connection = await asyncpg.connect(through(detour, database_url))
    assert detour.swallow() == 1
    with pytest.raises(TimeoutError):
        await connection.fetchval("SELECT 42", timeout=SILENCE)
    assert not connection.is_closed()
    other = await asyncpg.connect(through(detour, database_url))
    assert await other.fetchval("SELECT 42") == 42
    assert detour.swallow() == 1
    connection.terminate()
    other.terminate()


async def test_the_server_notices_in_the_end(detour: Detour, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orderflow.torture.detour.SERVER_NOTICES", 0.05)
    connection = await asyncpg.connect(through(detour, database_url))
    pid = connection.get_server_pid()
    watching = await asyncpg.connect(database_url)
    detour.swallow()
    async with asyncio.timeout(10):
        while await watching.fetchval("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid):
            await asyncio.sleep(0.01)
    assert not connection.is_closed()
    connection.terminate()
    await watching.close()


@pytest.mark.parametrize(("timeout", "times"), [(30.0, 1), (2.0, 2)])
async def test_the_acknowledgement_of_a_record_is_lost(
    connection: asyncpg.Connection, database_url: str, timeout: float, times: int
) -> None:
    """The same producer sends it again, and the broker knows it; another one, after the time for a round, makes it two."""
    if choose_broker().kind != "kafka":
        pytest.skip("needs Apache Kafka")
    detour = Detour()
    await detour.start()
    with scratch_directory() as directory, watching() as facts:
        kafka = ApacheKafka(directory, detour=detour.port)
        await kafka.start()
        detour.to = kafka.detoured_port
        relay = Restarted(relay_on(database_url, Through(detour), "events", timeout=timeout))
        try:
            async with running(relay):
                await insert_event(connection)
                await facts.until("EVENT_PUBLISHED")
                assert detour.mute() > 0
                await insert_event(connection)
                await eventually(lambda: is_there(kafka, 2), 20, what="the broker has written the record")
                assert detour.lost > 0
                assert len(facts.of("EVENT_PUBLISHED")) == 1
                if times > 1:
                    await facts.until("PUBLISH_INTERRUPTED")
                detour.unmute()
                await facts.until("EVENT_PUBLISHED", count=2)
                await all_published(connection)
            assert len(await records_in(kafka, "events")) == 1 + times
        finally:
            await detour.stop()
            await kafka.kill()


class Through:
    """A broker behind a detour."""

    def __init__(self, detour: Detour) -> None:
        self.bootstrap = f"127.0.0.1:{detour.port}"


async def is_there(kafka: ApacheKafka, count: int) -> bool:
    return len(await records_in(kafka, "events")) == count
