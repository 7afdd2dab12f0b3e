"""Handlers that ask for order: behind an event that is retried or buried the later ones wait, and follow it in their order."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from uuid import UUID, uuid4

import asyncpg

from orderflow.engine import dead_letters
from orderflow.engine.handling import Delivery
from orderflow.engine.handoff import Handoff
from orderflow.engine.message import Message
from orderflow.engine.outcome import Done, Outcome
from orderflow.engine.postgres import Connection
from orderflow.engine.relay import Relay
from orderflow.engine.retry import RetryPolicy
from tests.pipeline import PATIENCE, executing, kafka_for, opening, running, watching, worker_with
from tests.rows import dead_letter, insert_event, is_processed, record_of
from tests.servers import Broker
from tests.waiting import eventually


class Shipping:
    """Handles events in order, unless told otherwise; `failing` is asked whether an event fails this time."""

    def __init__(self, failing: Callable[[Message], bool] = lambda message: False, in_order: bool = True) -> None:
        self.in_order = in_order
        self.failing = failing
        self.handled: list[UUID] = []

    async def handle(self, delivery: Delivery) -> Outcome:
        if self.failing(delivery.message):
            raise ValueError("the parcel is lost")
        self.handled.append(delivery.message.id)
        return Done()

    async def before_giving_up(self, delivery: Delivery) -> Outcome | None:
        return None

    async def on_buried(self, connection: Connection, message: Message, reason: str) -> Callable[[], None]:
        return lambda: None


async def insert_events(connection: asyncpg.Connection, count: int, aggregate_id: UUID | None = None) -> list[UUID]:
    """Events of one aggregate, in their order."""
    chosen = aggregate_id or uuid4()
    return [await insert_event(connection, chosen) for _ in range(count)]


async def deliver(connection: asyncpg.Connection, url: str, handler: Shipping, *event_ids: UUID) -> None:
    """Deliver each as it stands in the outbox when its turn comes."""
    async with executing(url, handlers={"Shipped": handler}) as executor:
        for event_id in event_ids:
            await executor.execute(await record_of(connection, event_id))


async def waiting(connection: asyncpg.Connection) -> list[UUID]:
    """Those that wait behind another, in their order."""
    rows = await connection.fetch(
        "SELECT event_id FROM outbox WHERE published_at IS NULL AND available_at > now() + interval '0.5 s'"
        " AND available_at < 'infinity' ORDER BY seq"
    )
    return [row["event_id"] for row in rows]


async def notes(connection: asyncpg.Connection) -> list[UUID]:
    return [row["event_id"] for row in await connection.fetch("SELECT event_id FROM held_aggregates ORDER BY seq")]


async def test_later_events_wait_for_a_retry_and_follow_one_by_one(connection: asyncpg.Connection, database_url: str) -> None:
    first, second, third = await insert_events(connection, 3)
    handler = Shipping(failing=lambda message: message.id == first)
    await deliver(connection, database_url, handler, first, second, third)
    assert handler.handled == []
    assert await waiting(connection) == [second, third]
    assert await notes(connection) == [first, second, third]
    handler.failing = lambda message: False
    await deliver(connection, database_url, handler, first)
    assert await waiting(connection) == [third]
    # Somebody delivers the third too early: it waits for the second all the same.
    await deliver(connection, database_url, handler, third, second)
    assert handler.handled == [first, second]
    assert await waiting(connection) == []
    await deliver(connection, database_url, handler, third)
    assert handler.handled == [first, second, third]
    assert await notes(connection) == []
    # To wait is no failure.
    rows = await connection.fetch("SELECT attempt - first_attempt AS failed FROM outbox ORDER BY seq")
    assert [row["failed"] for row in rows] == [1, 0, 0]


async def test_behind_a_dead_letter_until_it_is_redriven(connection: asyncpg.Connection, database_url: str) -> None:
    first, second, third = await insert_events(connection, 3)
    handler = Shipping(failing=lambda message: message.id == first)
    await deliver(connection, database_url, handler, first, first, first, second, third, second)
    assert await dead_letter(connection, first) is not None
    assert (handler.handled, await waiting(connection)) == ([], [second, third])
    handler.failing = lambda message: False
    async with connection.transaction():
        await dead_letters.redrive(connection, first)
    assert await waiting(connection) == [second, third]
    await deliver(connection, database_url, handler, first, second, third)
    assert handler.handled == [first, second, third]
    assert await notes(connection) == []


async def test_a_discarded_dead_letter_lets_the_next_one_go(connection: asyncpg.Connection, database_url: str) -> None:
    first, second, third = await insert_events(connection, 3)
    handler = Shipping(failing=lambda message: message.id == first)
    await deliver(connection, database_url, handler, first, first, first, second, third)
    assert await dead_letters.discard_if_open(connection, first, "lost for good")
    assert await waiting(connection) == [third]
    await deliver(connection, database_url, handler, second, third)
    assert handler.handled == [second, third]


async def test_others_do_not_wait(connection: asyncpg.Connection, database_url: str) -> None:
    first, second = await insert_events(connection, 2)
    other = await insert_events(connection, 2)
    handler = Shipping(failing=lambda message: message.id == first)
    await deliver(connection, database_url, handler, first, second, *other)
    assert handler.handled == other
    # A type that nobody handles, such as OrderFailed, tells of the failure itself: it must not wait for it.
    unhandled = await insert_event(connection, await connection.fetchval("SELECT aggregate_id FROM outbox LIMIT 1"), "Told")
    await deliver(connection, database_url, handler, unhandled)
    assert await is_processed(connection, unhandled)
    # Nor does a handler that does not ask for order.
    careless = Shipping(failing=lambda message: message.id == first, in_order=False)
    first, second = await insert_events(connection, 2)
    await deliver(connection, database_url, careless, first, second)
    assert careless.handled == [second]


async def test_a_note_that_nobody_deleted_holds_nothing(connection: asyncpg.Connection, database_url: str) -> None:
    first, second, third = await insert_events(connection, 3)
    handler = Shipping(failing=lambda message: message.id == first)
    await deliver(connection, database_url, handler, first, second)
    # Processed by a worker that died before it let the next one go.
    await connection.execute("INSERT INTO processed_events VALUES ($1, 'dead')", first)
    handler.failing = lambda message: False
    await deliver(connection, database_url, handler, second, third)
    assert handler.handled == [second, third]
    assert await notes(connection) == []


async def test_in_order_by_way_of_kafka(connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str) -> None:
    aggregates = [uuid4() for _ in range(10)]
    placed: dict[UUID, list[UUID]] = defaultdict(list)
    for _ in range(6):
        for aggregate_id in aggregates:
            placed[aggregate_id].append(await insert_event(connection, aggregate_id))
    tried: set[UUID] = set()

    def failing(message: Message) -> bool:
        # Every second one at its first delivery; the third of each always, until it is redriven.
        if placed[message.aggregate_id].index(message.id) == 2:
            return not redriven.is_set()
        once = message.id.int % 2 == 0 and message.id not in tried
        tried.add(message.id)
        return once

    redriven = asyncio.Event()
    handler = Shipping(failing)
    target = kafka_for(kafka, topic)
    relay = Relay(opening(database_url, by_index=True), database_url, target, Handoff(), poll=0.2)
    policy = RetryPolicy(3, base=0.05, cap=0.05)
    with watching() as facts:
        async with running(relay, worker_with({"Shipped": handler}, database_url, target, policy=policy)):
            await facts.until("DLQ_EVENT", count=len(aggregates), timeout=2 * PATIENCE)
            assert len(handler.handled) == 2 * len(aggregates)
            redriven.set()
            for events in placed.values():
                async with connection.transaction():
                    await dead_letters.redrive(connection, events[2])
            await eventually(lambda: len(handler.handled) == 60, 2 * PATIENCE, what="all have been handled")
            await eventually(lambda: nothing_held(connection), what="no note is left")
    of = {event_id: aggregate_id for aggregate_id, events in placed.items() for event_id in events}
    handled: dict[UUID, list[UUID]] = defaultdict(list)
    for event_id in handler.handled:
        handled[of[event_id]].append(event_id)
    assert handled == placed


async def nothing_held(connection: asyncpg.Connection) -> bool:
    return await notes(connection) == []
