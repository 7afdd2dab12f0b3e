"""The janitor: what Kafka has lost, or a worker has skipped, is published again; what is settled is left alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from orderflow.app import kafka_of, relay_of, worker_of
from orderflow.engine import janitor as janitor_module
from orderflow.engine import seams
from orderflow.engine.handoff import Handoff
from orderflow.engine.janitor import JANITOR_LOCK, Janitor
from orderflow.health import Health
from tests.pipeline import opened, opening, running, settings_for, watching
from tests.rows import charges_of, insert_event, order_row, place, set_mode, settled, violations
from tests.servers import Broker
from tests.topics import records_in
from tests.waiting import eventually

LONG_AGO = """
UPDATE outbox SET published_at = now() - interval '10 min', created_at = now() - interval '11 min' WHERE event_id = ANY($1)
"""


async def everything() -> datetime:
    return datetime.now(UTC)


def janitor_of(url: str, horizon: float = 60.0, consumed_until: Callable[[], Awaitable[datetime]] = everything) -> Janitor:
    return Janitor(opening(url), consumed_until, horizon=horizon, patrol_from=0)


async def due(connection: asyncpg.Connection) -> set[UUID]:
    return {row["event_id"] for row in await connection.fetch("SELECT event_id FROM outbox WHERE published_at IS NULL")}


async def test_only_what_is_lost_and_only_once_a_horizon(connection: asyncpg.Connection, database_url: str) -> None:
    lost, processed, buried, recent = [await insert_event(connection) for _ in range(4)]
    await connection.execute(LONG_AGO, [lost, processed, buried])
    await connection.execute("UPDATE outbox SET published_at = now() WHERE event_id = $1", recent)
    await connection.execute("INSERT INTO processed_events VALUES ($1, 'w')", processed)
    await connection.execute("INSERT INTO dead_letter_events (event_id, reason) VALUES ($1, 'r')", buried)
    janitor = janitor_of(database_url)
    async with opened(database_url) as database:
        with watching() as facts:
            assert await janitor.run_once(database) == 1
            assert await janitor.run_once(database) == 0
            assert await due(connection) == {lost}
            # The relay has published it again: there is time for its delivery.
            await connection.execute("UPDATE outbox SET published_at = now() WHERE event_id = $1", lost)
            assert await janitor.run_once(database) == 0
            # Lost once more.
            await connection.execute(LONG_AGO, [lost])
            assert await janitor.run_once(database) == 1
            await connection.execute("UPDATE outbox SET published_at = now() - interval '1 day'")
            await connection.execute("INSERT INTO processed_events VALUES ($1, 'w'), ($2, 'w')", lost, recent)
            assert await janitor.run_once(database) == 0
    assert facts.of("RECONCILED") == [{"events": 1}, {"events": 1}]


async def test_what_still_waits_in_kafka_is_not_lost(connection: asyncpg.Connection, database_url: str) -> None:
    lost, waiting = await insert_event(connection), await insert_event(connection)
    await connection.execute(LONG_AGO, [lost, waiting])
    await connection.execute("UPDATE outbox SET published_at = now() - interval '5 min' WHERE event_id = $1", waiting)
    reached = datetime.now(UTC) - timedelta(minutes=7)

    async def consumed_until() -> datetime:
        return reached

    janitor = janitor_of(database_url, consumed_until=consumed_until)
    async with opened(database_url) as database:
        assert await janitor.run_once(database) == 1
        assert await due(connection) == {lost}
        reached = datetime.now(UTC)
        assert await janitor.run_once(database) == 1
        assert await due(connection) == {lost, waiting}


async def test_scheduled_and_buried_rows_are_left_alone(connection: asyncpg.Connection, database_url: str) -> None:
    scheduled, buried = await insert_event(connection), await insert_event(connection)
    await connection.execute("UPDATE outbox SET available_at = now() + interval '1 hour' WHERE event_id = $1", scheduled)
    await connection.execute(LONG_AGO, [buried])
    await connection.execute("UPDATE outbox SET available_at = 'infinity' WHERE event_id = $1", buried)
    await connection.execute("INSERT INTO dead_letter_events (event_id, reason) VALUES ($1, 'r')", buried)
    async with opened(database_url) as database:
        assert await janitor_of(database_url).run_once(database) == 0


async def test_what_is_lost_later_is_found_by_a_janitor_that_has_looked_before(
    connection: asyncpg.Connection, database_url: str
) -> None:
    janitor = janitor_of(database_url, horizon=1.0)
    async with opened(database_url) as database:
        for _ in range(3):
            event_id = await insert_event(connection)
            # Not yet old enough to be looked for; it must not fall behind the janitor's own mark.
            await connection.execute("UPDATE outbox SET published_at = now() WHERE event_id = $1", event_id)
            assert await janitor.run_once(database) == 0
            assert await janitor.run_once(database) == 0
            await connection.execute(LONG_AGO, [event_id])
            assert await janitor.run_once(database) == 1
            await connection.execute("UPDATE outbox SET published_at = now() WHERE event_id = $1", event_id)
            await connection.execute("INSERT INTO processed_events VALUES ($1, 'w')", event_id)


async def test_an_old_event_that_comes_back_by_a_redrive_is_still_looked_after(
    connection: asyncpg.Connection, database_url: str
) -> None:
    janitor = janitor_of(database_url)
    buried, recent = await insert_event(connection), await insert_event(connection)
    await connection.execute(LONG_AGO, [buried])
    await connection.execute("INSERT INTO dead_letter_events (event_id, reason) VALUES ($1, 'r')", buried)
    async with opened(database_url) as database:
        assert await janitor.run_once(database) == 0
        assert await janitor.run_once(database) == 0
        # Redriven, published again, and lost by Kafka: it was created long before what the janitor has seen settled.
        await connection.execute("DELETE FROM dead_letter_events")
        await connection.execute("UPDATE outbox SET attempt = 2, first_attempt = 2 WHERE event_id = $1", buried)
        await eventually(lambda: finds_something(janitor, database), 20)
    assert await due(connection) == {buried, recent}


async def finds_something(janitor: Janitor, database: object) -> bool:
    return await janitor.run_once(database) == 1  # type: ignore[arg-type]


async def test_what_waited_for_a_retry_when_its_time_came_is_watched(connection: asyncpg.Connection, database_url: str) -> None:
    janitor = janitor_of(database_url)
    event_id = await insert_event(connection)
    async with opened(database_url) as database:
        assert await janitor.run_once(database) == 0
        await connection.execute(LONG_AGO, [event_id])
        await connection.execute("UPDATE outbox SET published_at = NULL, available_at = now() + interval '1 hour'")
        assert await janitor.run_once(database) == 0
        # Its retry was published, and lost.
        await connection.execute(LONG_AGO, [event_id])
        await connection.execute("UPDATE outbox SET available_at = NULL")
        assert await janitor.run_once(database) == 1
        await connection.execute("INSERT INTO processed_events VALUES ($1, 'w')", event_id)
        await connection.execute(LONG_AGO, [event_id])
        assert await janitor.run_once(database) == 0
    assert janitor._watched == set()


async def test_the_patrol_comes_round_page_by_page(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(janitor_module, "PAGE", 1)
    aggregate = uuid4()
    events = [await insert_event(connection, aggregate) for _ in range(6)]
    await connection.execute(LONG_AGO, events)
    await connection.execute("INSERT INTO processed_events SELECT unnest($1::uuid[]), 'w'", events[:5])
    async with opened(database_url) as database:
        janitor = janitor_of(database_url)
        for _ in range(5):
            assert await janitor.run_once(database) == 0
        assert await janitor.run_once(database) == 1
    assert await due(connection) == {events[5]}


async def test_a_patrol_that_begins_in_the_midst_comes_round_as_well(connection: asyncpg.Connection, database_url: str) -> None:
    before = await insert_event(connection)
    await connection.execute(LONG_AGO, [before])
    end = await connection.fetchval("SELECT max(seq) FROM outbox")
    async with opened(database_url) as database:
        janitor = Janitor(opening(database_url), everything, patrol_from=end)
        # It finds no more rows, and goes on at the first one.
        assert [await janitor.run_once(database) for _ in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(("failure", "stays"), [("_examine.before=raise@3", 2), ("_publish_again.after=drop@3", 2)])
async def test_a_turn_that_fails_has_not_worked_in_vain_and_skips_nothing(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch, failure: str, stays: int
) -> None:
    monkeypatch.setattr(janitor_module, "PAGE", 1)
    aggregate = uuid4()
    events = [await insert_event(connection, aggregate) for _ in range(4)]
    # Young enough to be found by its age, by a janitor that has just been started.
    age = "UPDATE outbox SET published_at = now() - interval '4 min', created_at = now() - interval '5 min'"
    await connection.execute(age)
    janitor = janitor_of(database_url)
    async with opened(database_url) as database:
        disarm = seams.arm(f"janitor.{failure}")
        try:
            with watching() as facts, pytest.raises(seams.ConnectionLost):
                await janitor.run_once(database)
        finally:
            disarm()
        assert await due(connection) == set(events[:stays])
        assert facts.of("RECONCILED") == [{"events": 1}] * stays
        assert await janitor.run_once(database) == 4 - stays
    assert await due(connection) == set(events)


async def test_one_janitor_at_a_time(connection: asyncpg.Connection, database_url: str) -> None:
    await connection.execute(LONG_AGO, [await insert_event(connection)])
    async with opened(database_url) as database:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", JANITOR_LOCK)
            assert await janitor_of(database_url).run_once(database) == 0
        assert await janitor_of(database_url).run_once(database) == 1


async def test_an_event_that_kafka_does_not_have_settles_its_order(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    await set_mode(connection, "succeed")
    placed = await place(connection, 3)
    # Marked as published, and Kafka has never seen it: a wiped disk, or a row marked by hand.
    await connection.execute(LONG_AGO, [event_id for _, event_id in placed])
    settings = settings_for(database_url, kafka, topic)
    relay = relay_of(settings, kafka_of(settings), Handoff(), Health())
    worker = worker_of(settings, kafka_of(settings), Health())
    with watching() as facts:
        async with running(relay, worker, janitor_of(database_url, horizon=5.0)):
            await settled(connection)
    for order_id, _ in placed:
        assert await order_row(connection, order_id) == ("PAID", 3, None)
        assert await charges_of(connection, order_id) == ["settled"]
    assert facts.of("RECONCILED") == [{"events": 3}]
    assert await violations(connection) == {}


async def test_an_offset_that_was_skipped_settles_its_order(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    await set_mode(connection, "succeed")
    settings = settings_for(database_url, kafka, topic)
    with watching() as facts:
        ((order_id, event_id),) = await place(connection)
        async with running(relay_of(settings, kafka_of(settings), Handoff(), Health())):
            await facts.until("EVENT_PUBLISHED", eventId=event_id)
            await eventually(lambda: connection.fetchval("SELECT published_at FROM outbox"))
    # Somebody has set the group's offsets to the end.
    (record,) = await records_in(kafka, topic)
    skipper = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, group_id=topic, enable_auto_commit=False)
    await skipper.start()
    try:
        place_of_it = TopicPartition(topic, record.partition)
        skipper.assign([place_of_it])
        await skipper.commit({place_of_it: record.offset + 1})
    finally:
        await skipper.stop()
    relay = relay_of(settings, kafka_of(settings), Handoff(), Health())
    worker = worker_of(settings, kafka_of(settings), Health())
    await connection.execute(LONG_AGO, [event_id])
    async with running(relay, worker, janitor_of(database_url, horizon=5.0)):
        await settled(connection)
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert await violations(connection) == {}
