"""The outbox's acts on its rows: what is due, in which order, and the guard of each change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest

from orderflow.engine import dead_letters, outbox
from orderflow.engine.ids import new_id
from orderflow.engine.message import Message
from orderflow.engine.outbox import SHARDS, Failure, Republish
from orderflow.engine.postgres import Database
from tests.pipeline import opened
from tests.rows import insert_event, message_of, one_database

database_url = one_database
EVERYTHING = list(range(SHARDS))


@pytest.fixture(autouse=True)
async def nothing_is_due(connection: asyncpg.Connection) -> None:
    """What an earlier test left."""
    await connection.execute("TRUNCATE outbox, processed_events, dead_letter_events")


async def due(connection: asyncpg.Connection, shards: Iterable[int] = EVERYTHING, limit: int = 1000) -> list[UUID]:
    return [message.id for message in (await outbox.fetch_due(connection, list(shards), limit)).messages]


def failure(attempt: int) -> Failure:
    return Failure(attempt, datetime.now(UTC), "ChargeFailed", "no luck")


async def retry(database: Database, event_id: UUID, attempt: int, delay: float = 0.0) -> bool:
    return (
        await outbox.republish_if_attempt(database, [Republish(event_id, attempt, timedelta(seconds=delay), failure(attempt))])
    )[0]


async def test_what_is_appended_is_fetched_as_it_was(connection: asyncpg.Connection) -> None:
    message = Message(
        new_id(),
        "OrderPaid",
        "order",
        uuid4(),
        {"orderId": "x", "amount": "10.50"},
        datetime.now(UTC),
        headers={"traceparent": "00-ab"},
    )
    await outbox.append(connection, [message])
    (fetched,) = (await outbox.fetch_due(connection, EVERYTHING, 10)).messages
    assert isinstance(fetched.payload, str)
    assert json.loads(fetched.payload) == message.payload
    assert (fetched.id, fetched.type, fetched.aggregate_id, fetched.attempt) == (
        message.id,
        "OrderPaid",
        message.aggregate_id,
        1,
    )
    assert fetched.headers == {"traceparent": "00-ab"}


async def test_an_event_is_written_with_its_cause_or_not_at_all(connection: asyncpg.Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await insert_event(connection)
    await transaction.rollback()
    assert await due(connection) == []


async def test_order_within_an_aggregate_is_the_order_of_its_rows(connection: asyncpg.Connection) -> None:
    aggregates = [uuid4() for _ in range(5)]
    written = [(aggregate, await insert_event(connection, aggregate)) for _ in range(6) for aggregate in aggregates]
    fetched = (await outbox.fetch_due(connection, EVERYTHING, 1000)).messages
    assert [(message.aggregate_id, message.id) for message in fetched] == written


async def test_a_fetch_sees_only_the_shards_it_asks_for(connection: asyncpg.Connection) -> None:
    written = {await insert_event(connection) for _ in range(40)}
    found: list[UUID] = []
    for shard in EVERYTHING:
        found += await due(connection, [shard])
    assert sorted(found) == sorted(written)
    assert await due(connection, []) == []


async def test_a_full_shard_does_not_keep_the_others_waiting(connection: asyncpg.Connection) -> None:
    crowded = uuid4()
    for _ in range(300):
        await insert_event(connection, crowded)
    for _ in range(10):
        await insert_event(connection)
    elsewhere = await connection.fetch(
        "SELECT event_id FROM outbox WHERE shard <> (SELECT shard FROM outbox WHERE aggregate_id = $1 LIMIT 1)", crowded
    )
    assert {row["event_id"] for row in elsewhere} <= set(await due(connection, limit=64))


async def test_a_row_that_becomes_visible_late_is_not_lost(connection: asyncpg.Connection, database_url: str) -> None:
    slow = await asyncpg.connect(database_url, timeout=10)
    try:
        transaction = slow.transaction()
        await transaction.start()
        late = await insert_event(slow)
        early = await insert_event(connection)
        (message,) = (await outbox.fetch_due(connection, EVERYTHING, 10)).messages
        assert message.id == early
        await outbox.mark_published_if_attempt(connection, [message])
        await transaction.commit()
        assert await due(connection) == [late]
    finally:
        await slow.close()


async def test_scheduled_rows_come_when_they_are_due_and_not_before(connection: asyncpg.Connection) -> None:
    event_id = await insert_event(connection)
    await connection.execute("UPDATE outbox SET available_at = now() + interval '1 hour'")
    assert await due(connection) == []
    seconds = await outbox.next_due(connection, EVERYTHING)
    assert seconds is not None
    assert 3500 < seconds <= 3600
    await connection.execute("UPDATE outbox SET available_at = now()")
    assert await due(connection) == [event_id]
    (message,) = (await outbox.fetch_due(connection, EVERYTHING, 10)).messages
    await outbox.mark_published_if_attempt(connection, [message])
    assert await due(connection) == []
    assert await outbox.next_due(connection, EVERYTHING) is None


async def test_a_buried_row_is_never_due_and_wakes_nobody(connection: asyncpg.Connection) -> None:
    await insert_event(connection)
    await connection.execute("UPDATE outbox SET available_at = 'infinity'")
    assert await due(connection) == []
    assert await outbox.next_due(connection, EVERYTHING) is None


async def test_a_mark_clears_no_retry_that_was_scheduled_meanwhile(connection: asyncpg.Connection, database_url: str) -> None:
    event_id = await insert_event(connection)
    sent = (await outbox.fetch_due(connection, EVERYTHING, 10)).messages
    async with opened(database_url) as database:
        # The consumer was faster than the relay's mark.
        assert await retry(database, event_id, attempt=1)
    await outbox.mark_published_if_attempt(connection, sent)
    row = await connection.fetchrow("SELECT attempt, published_at, available_at FROM outbox WHERE event_id = $1", event_id)
    assert row["attempt"] == 2
    assert row["published_at"] is None
    assert await due(connection) == [event_id]


async def test_a_mark_of_different_attempts_clears_no_retry_either(connection: asyncpg.Connection, database_url: str) -> None:
    failing, other = await insert_event(connection), await insert_event(connection)
    await connection.execute("UPDATE outbox SET attempt = 5 WHERE event_id = $1", other)
    sent = (await outbox.fetch_due(connection, EVERYTHING, 10)).messages
    assert {message.attempt for message in sent} == {1, 5}
    async with opened(database_url) as database:
        assert await retry(database, failing, attempt=1)
    await outbox.mark_published_if_attempt(connection, sent)
    assert await due(connection) == [failing]


async def test_a_mark_does_not_move_the_time_of_the_first_acknowledgement(connection: asyncpg.Connection) -> None:
    await insert_event(connection)
    sent = (await outbox.fetch_due(connection, EVERYTHING, 10)).messages
    await outbox.mark_published_if_attempt(connection, sent)
    first = await connection.fetchval("SELECT published_at FROM outbox")
    await outbox.mark_published_if_attempt(connection, sent)
    assert await connection.fetchval("SELECT published_at FROM outbox") == first


async def test_of_two_deliveries_of_one_attempt_one_counts(connection: asyncpg.Connection, database_url: str) -> None:
    event_id = await insert_event(connection)
    async with opened(database_url) as one, opened(database_url) as other:
        results = await asyncio.gather(*(retry(database, event_id, 1, delay=60) for database in (one, other)))
        assert sorted(results) == [False, True]
        assert not await retry(one, event_id, attempt=1)
        assert await retry(one, event_id, attempt=2)
    row = await connection.fetchrow("SELECT attempt, failures FROM outbox WHERE event_id = $1", event_id)
    assert row["attempt"] == 3
    assert [entry["attempt"] for entry in json.loads(row["failures"])] == [1, 2]
    assert set(json.loads(row["failures"])[0]) == {"attempt", "at", "error", "message"}


async def test_a_group_of_retries_is_answered_one_by_one(connection: asyncpg.Connection, database_url: str) -> None:
    event_ids = [await insert_event(connection) for _ in range(3)]
    async with opened(database_url) as database:
        assert await retry(database, event_ids[1], 1)
        group = [Republish(event_id, 1, timedelta(0), failure(1)) for event_id in [*event_ids, uuid4()]]
        assert await outbox.republish_if_attempt(database, group) == [True, False, True, False]


async def test_a_postponement_uses_no_attempt_and_outlasts_a_slower_mark(
    connection: asyncpg.Connection, database_url: str
) -> None:
    event_id = await insert_event(connection)
    message = await message_of(connection, event_id)
    async with opened(database_url) as database:
        assert await outbox.republish_if_attempt(database, [Republish(event_id, 1, timedelta(0), None)]) == [True]
        # The relay, whose record the worker was faster to put off than it was to mark it.
        await outbox.mark_published_if_attempt(connection, [message])
        # The record is delivered once more: what is put off already is not put off again.
        assert await outbox.republish_if_attempt(database, [Republish(event_id, 1, timedelta(hours=1), None)]) == [False]
    row = await connection.fetchrow(
        "SELECT attempt - first_attempt AS failed, failures FROM outbox WHERE event_id = $1", event_id
    )
    assert tuple(row) == (0, None)
    assert await due(connection) == [event_id]


async def test_a_late_failure_does_not_dig_up_what_lies_buried(connection: asyncpg.Connection, database_url: str) -> None:
    event_id = await insert_event(connection)
    message = await message_of(connection, event_id)
    async with connection.transaction():
        assert await dead_letters.bury_if_attempt(
            connection, message, reason="dead", failure=None, error=None, place=None, worker_id="w"
        )
    async with opened(database_url) as database:
        assert not await retry(database, event_id, attempt=1)
    assert await due(connection) == []
    assert await connection.fetchval("SELECT available_at = 'infinity' FROM outbox WHERE event_id = $1", event_id)


async def test_a_retry_wakes_the_relay(connection: asyncpg.Connection, database_url: str) -> None:
    heard = asyncio.Event()
    await connection.add_listener(outbox.CHANNEL, lambda *_: heard.set())
    event_id = await insert_event(connection)
    await connection.execute("SELECT 1")
    heard.clear()
    async with opened(database_url) as database:
        await retry(database, event_id, attempt=1)
    await asyncio.wait_for(heard.wait(), 20)


async def test_replay_makes_rows_due_as_the_attempt_they_are_at_and_leaves_buried_ones(connection: asyncpg.Connection) -> None:
    event_ids = [await insert_event(connection) for _ in range(3)]
    await connection.execute("UPDATE outbox SET published_at = now(), attempt = 4 WHERE event_id = $1", event_ids[0])
    await connection.execute("UPDATE outbox SET published_at = now()")
    await connection.execute("UPDATE outbox SET available_at = 'infinity' WHERE event_id = $1", event_ids[2])
    assert await due(connection) == []
    assert await outbox.replay(connection, [*event_ids, uuid4()]) == 2
    assert await due(connection) == event_ids[:2]
    assert await connection.fetchval("SELECT attempt FROM outbox WHERE event_id = $1", event_ids[0]) == 4


async def test_what_a_replay_selects(connection: asyncpg.Connection) -> None:
    aggregate = uuid4()
    first, second = await insert_event(connection, aggregate, "Packed"), await insert_event(connection, aggregate, "Shipped")
    other, buried = await insert_event(connection, kind="Shipped"), await insert_event(connection, aggregate)
    await connection.execute("UPDATE outbox SET created_at = now() - interval '1 day' WHERE event_id = $1", first)
    await connection.execute("UPDATE outbox SET available_at = 'infinity' WHERE event_id = $1", buried)
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    select = outbox.select_for_replay
    assert await select(connection, aggregate_id=aggregate) == [first, second]
    assert await select(connection, since=hour_ago) == [second, other]
    assert await select(connection, until=hour_ago) == [first]
    assert await select(connection, event_type="Shipped") == [second, other]
    assert await select(connection, aggregate_id=aggregate, since=hour_ago, event_type="Shipped") == [second]
    assert await select(connection, since=hour_ago, until=hour_ago) == []


async def test_what_was_published_and_never_settled(connection: asyncpg.Connection) -> None:
    lost, processed, buried, recent, unpublished = [await insert_event(connection) for _ in range(5)]
    await connection.execute("UPDATE outbox SET published_at = now() - interval '5 min' WHERE event_id <> $1", unpublished)
    await connection.execute("UPDATE outbox SET published_at = now() WHERE event_id = $1", recent)
    await connection.execute("INSERT INTO processed_events VALUES ($1, 'w')", processed)
    await connection.execute("INSERT INTO dead_letter_events (event_id, reason) VALUES ($1, 'r')", buried)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)

    async def republish(since: datetime = epoch, limit: int = 10) -> list[UUID]:
        return await outbox.republish_unsettled(connection, since=since, published_before=timedelta(minutes=1), limit=limit)

    assert await republish(since=datetime.now(UTC) + timedelta(hours=1)) == []
    assert await republish(limit=0) == []
    assert await republish() == [lost]
    assert await republish() == []
    assert await due(connection) == [lost, unpublished]
