"""Dead letters: what is kept, who may bury, and how a letter is closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from orderflow.engine import dead_letters
from orderflow.engine.dead_letters import Place
from orderflow.engine.outbox import Failure
from orderflow.engine.postgres import Database
from tests.rows import dead_letter, insert_event, message_of, one_database

database_url = one_database


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url, size=2, timeout=5.0)
    yield opened
    await opened.close()


@pytest.fixture(autouse=True)
async def nothing_is_buried(connection: asyncpg.Connection) -> None:
    """What an earlier test left."""
    await connection.execute("TRUNCATE outbox, processed_events, dead_letter_events")


async def bury(connection: asyncpg.Connection, event_id: UUID, reason: str = "dead", published: bool = True) -> bool:
    message = await message_of(connection, event_id)
    failure = Failure(message.attempt, datetime.now(UTC), "ValueError", "no")
    async with connection.transaction():
        return await dead_letters.bury_if_attempt(
            connection, message, reason=reason, failure=failure, error=ValueError("no"),
            place=Place("t", 1, 2), worker_id="w", published=published,
        )  # fmt: skip


async def test_what_is_kept(connection: asyncpg.Connection) -> None:
    event_id = await insert_event(connection, kind="Shipped", payload='{"amount": 12345678901234567890.10}')
    await connection.execute("""UPDATE outbox SET headers = '{"traceparent": "00-ab"}'""")
    assert await bury(connection, event_id, reason="Max retries exceeded (3)")
    (letter,) = await dead_letters.fetch(connection)
    assert (letter.event_id, letter.event_type, letter.reason) == (event_id, "Shipped", "Max retries exceeded (3)")
    assert (letter.error_class, letter.error_message, letter.worker_id) == ("ValueError", "no", "w")
    assert (letter.topic, letter.partition, letter.offset, letter.raw) == ("t", 1, 2, None)
    assert letter.headers == {"traceparent": "00-ab"}
    assert [attempt["attempt"] for attempt in letter.attempts] == [1]
    assert letter.discarded_at is letter.discard_reason is None
    row = await dead_letter(connection, event_id)
    assert row is not None
    # As it was written, and not by way of a float.
    assert row["payload"] == '{"amount": 12345678901234567890.10}'


async def test_buried_once(connection: asyncpg.Connection) -> None:
    event_id = await insert_event(connection)
    assert await bury(connection, event_id, "first")
    assert not await bury(connection, event_id, "second")
    assert [letter.reason for letter in await dead_letters.fetch(connection)] == ["first"]


async def test_two_at_once_bury_once(connection: asyncpg.Connection, database_url: str) -> None:
    event_ids = [await insert_event(connection) for _ in range(10)]
    other = await asyncpg.connect(database_url, timeout=10)
    try:
        for event_id in event_ids:
            results = await asyncio.gather(bury(connection, event_id), bury(other, event_id))
            assert sorted(results) == [False, True]
    finally:
        await other.close()
    assert len(await dead_letters.fetch(connection)) == 10


async def test_never_what_has_been_processed_nor_moved_to_another_attempt(connection: asyncpg.Connection) -> None:
    processed, moved = await insert_event(connection), await insert_event(connection)
    await connection.execute("INSERT INTO processed_events VALUES ($1, 'w')", processed)
    assert not await bury(connection, processed)
    old = await message_of(connection, moved)
    await connection.execute("UPDATE outbox SET attempt = 2 WHERE event_id = $1", moved)
    async with connection.transaction():
        assert not await dead_letters.bury_if_attempt(
            connection, old, reason="late", failure=None, error=None, place=None, worker_id="w"
        )
    assert await dead_letters.fetch(connection) == []


@pytest.mark.parametrize("published", [True, False])
async def test_whether_it_was_published_is_kept(connection: asyncpg.Connection, published: bool) -> None:
    # Buried by a worker it was delivered, even where the relay's mark comes later; buried by the relay it never was.
    event_id = await insert_event(connection)
    await bury(connection, event_id, published=published)
    assert (await connection.fetchval("SELECT published_at FROM outbox") is not None) is published


async def test_a_stranger_is_buried_once_with_its_bytes(connection: asyncpg.Connection, database: Database) -> None:
    def stranger(offset: int) -> dead_letters.Foreign:
        headers = {"a\0": "\\u0000", "b": "\\\\u0000\0"}
        place = Place("t", 0, offset)
        return dead_letters.Foreign(place.event_id(), "no \0 idea", place, b"\x00\xff", headers, ValueError("a\0b"))

    assert await dead_letters.bury_foreign(database, [stranger(9), stranger(10)], "w") == [True, True]
    assert await dead_letters.bury_foreign(database, [stranger(9), stranger(11)], "w") == [False, True]
    letters = await dead_letters.fetch(connection)
    assert {letter.offset for letter in letters} == {9, 10, 11}
    for letter in letters:
        assert letter.raw == b"\x00\xff"
        assert letter.reason == "no \ufffd idea"
        assert (letter.error_class, letter.error_message) == ("ValueError", "a\ufffdb")
        assert letter.headers == {"a\ufffd": "\\u0000", "b": "\\\\u0000\ufffd"}
        assert (letter.event_type, letter.aggregate_id, letter.payload, letter.worker_id) == (None, None, None, "w")


async def test_a_discard_keeps_its_reason_and_is_final(connection: asyncpg.Connection) -> None:
    event_id = await insert_event(connection)
    await bury(connection, event_id)
    assert await dead_letters.discard_if_open(connection, event_id, "a test order")
    assert not await dead_letters.discard_if_open(connection, event_id, "once more")
    assert not await dead_letters.discard_if_open(connection, uuid4(), "unknown")
    assert await dead_letters.fetch(connection) == []
    (letter,) = await dead_letters.fetch(connection, discarded=True)
    assert letter.discard_reason == "a test order"
    assert letter.discarded_at is not None
    with pytest.raises(dead_letters.NotRedrivable, match="was discarded"):
        await dead_letters.redrive(connection, event_id)


async def test_listing(connection: asyncpg.Connection) -> None:
    event_ids = [await insert_event(connection) for _ in range(4)]
    for number, event_id in enumerate(event_ids):
        await bury(connection, event_id)
        await connection.execute(
            "UPDATE dead_letter_events SET failed_at = now() - make_interval(hours => $2) WHERE event_id = $1", event_id, number
        )

    async def ids(**options: object) -> list[UUID]:
        return [letter.event_id for letter in await dead_letters.fetch(connection, **options)]  # type: ignore[arg-type]

    assert await ids() == event_ids
    assert await ids(limit=2) == event_ids[:2]
    assert await ids(event_ids=[event_ids[3], uuid4()]) == [event_ids[3]]
    assert await ids(event_ids=[]) == []


async def test_a_redrive_gives_fresh_attempts_and_keeps_the_old_ones_in_the_row(connection: asyncpg.Connection) -> None:
    event_id = await insert_event(connection)
    await connection.execute("UPDATE outbox SET attempt = 3")
    await bury(connection, event_id)
    heard = asyncio.Event()
    await connection.add_listener("orderflow_outbox", lambda *_: heard.set())
    async with connection.transaction():
        assert (await dead_letters.redrive(connection, event_id))[0] == "Shipped"
    row = await connection.fetchrow(
        "SELECT attempt, first_attempt, published_at, available_at <= now() AS due, failures FROM outbox"
    )
    assert (row["attempt"], row["first_attempt"], row["published_at"], row["due"]) == (4, 4, None, True)
    assert [entry["attempt"] for entry in json.loads(row["failures"])] == [3]
    assert await dead_letters.fetch(connection, discarded=True) == []
    await asyncio.wait_for(heard.wait(), 20)
