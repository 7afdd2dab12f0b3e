"""Redrive, discard and replay: a person's decision brings an event back, by legal steps only."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import asyncpg
import pytest

from orderflow.app import kafka_of, relay_of, worker_of
from orderflow.engine import dead_letters, outbox
from orderflow.engine.dead_letters import NotRedrivable
from orderflow.engine.handoff import Handoff
from orderflow.health import Health
from orderflow.payments.gateway import Charge, ChargeFailed, Declined
from orderflow.payments.redrive import RedriveResult, redrive
from tests.pipeline import FakeGateway, executing, running, settings_for, watching
from tests.rows import (
    charges_of,
    dead_letter,
    events_of,
    insert_event,
    is_processed,
    order_row,
    place,
    record_of,
    set_mode,
    settled,
    violations,
)
from tests.servers import Broker


def failing(error: Exception) -> FakeGateway:
    gateway = FakeGateway()

    def charge(_: object) -> None:
        raise error

    gateway.on_charge = charge
    return gateway


async def fail_three_times(connection: asyncpg.Connection, url: str, event_id: UUID) -> None:
    async with executing(url, failing(ChargeFailed("no"))) as executor:
        for _ in range(3):
            await executor.execute(await record_of(connection, event_id))


async def test_a_technically_failed_order_is_taken_back_and_paid(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    old = await record_of(connection, event_id)
    await fail_three_times(connection, database_url, event_id)
    assert await redrive(connection, event_id) == RedriveResult(event_id, "OrderCreated", order_id, True)
    assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 4, None)
    gateway = FakeGateway()
    with watching() as facts:
        async with executing(database_url, gateway) as executor:
            # What is still on its way from before the redrive decides nothing any more.
            await executor.execute(old)
            assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 4, None)
            await executor.execute(await record_of(connection, event_id))
    assert await order_row(connection, order_id) == ("PAID", 5, None)
    # A charge might exist from the attempts before: the gateway was asked.
    assert gateway.asked == [order_id]
    assert await events_of(connection, order_id) == ["OrderCreated", "OrderFailed", "OrderPaid"]
    assert len(facts.of("DUPLICATE_EVENT")) == 1
    assert await dead_letter(connection, event_id) is None


async def test_attempts_are_counted_from_one_again_and_it_can_be_buried_again(
    connection: asyncpg.Connection, database_url: str
) -> None:
    ((order_id, event_id),) = await place(connection)
    for turn in range(1, 4):
        with watching() as facts:
            await fail_three_times(connection, database_url, event_id)
        assert [fact["retryCount"] for fact in facts.of("PROCESSING_ERROR")] == [1, 2, 3]
        assert facts.of("DLQ_EVENT") == [{"eventId": event_id, "reason": "Max retries exceeded (3)"}]
        assert await order_row(connection, order_id) == ("FAILED", 1 + 2 * turn, "error")
        await redrive(connection, event_id)
    assert (await events_of(connection, order_id)).count("OrderFailed") == 3


async def test_a_redriven_order_may_be_declined_and_that_is_final(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    await fail_three_times(connection, database_url, event_id)
    await redrive(connection, event_id)
    async with executing(database_url, failing(Declined("no"))) as executor:
        await executor.execute(await record_of(connection, event_id))
    assert await order_row(connection, order_id) == ("FAILED", 5, "declined")
    with pytest.raises(NotRedrivable, match="no such dead letter"):
        await redrive(connection, event_id)


async def test_a_decline_of_before_the_redrive_decides_nothing(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    slow, charging = FakeGateway(), asyncio.Event()
    answer: asyncio.Future[Charge] = asyncio.get_running_loop().create_future()

    def charge(_: object) -> asyncio.Future[Charge]:
        charging.set()
        return answer

    slow.on_charge = charge
    async with executing(database_url, slow) as executor:
        zombie = asyncio.create_task(executor.execute(await record_of(connection, event_id)))
        await asyncio.wait_for(charging.wait(), 30)
        await fail_three_times(connection, database_url, event_id)
        await redrive(connection, event_id)
        answer.set_exception(Declined("no"))
        await asyncio.wait_for(zombie, 30)
    # Pending again, at another version than the one on which that charge was begun: the redrive's own attempt will ask.
    assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 4, None)
    assert not await is_processed(connection, event_id)


async def test_a_declined_order_is_never_taken_back(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    async with executing(database_url, failing(Declined("no"))) as executor:
        await executor.execute(await record_of(connection, event_id))
    # A dead letter of a declined order's event is none that we make; whoever made it moves no money with it.
    await connection.execute("DELETE FROM processed_events")
    await connection.execute(
        "INSERT INTO dead_letter_events (event_id, event_type, aggregate_id, reason) VALUES ($1, 'OrderCreated', $2, 'x')",
        event_id, order_id,
    )  # fmt: skip
    assert not (await redrive(connection, event_id)).order_reopened
    gateway = FakeGateway()
    async with executing(database_url, gateway) as executor:
        await executor.execute(await record_of(connection, event_id))
    assert await order_row(connection, order_id) == ("FAILED", 3, "declined")
    assert gateway.requests == []
    assert await is_processed(connection, event_id)


async def test_an_order_that_is_still_in_work_needs_no_step_back(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    await connection.execute(
        "INSERT INTO dead_letter_events (event_id, event_type, aggregate_id, reason) VALUES ($1, 'OrderCreated', $2, 'x')",
        event_id, order_id,
    )  # fmt: skip
    assert not (await redrive(connection, event_id)).order_reopened
    assert await order_row(connection, order_id) == ("CREATED", 1, None)


async def test_what_cannot_be_redriven_changes_nothing(connection: asyncpg.Connection) -> None:
    foreign, discarded = uuid4(), await insert_event(connection)
    await connection.execute(
        "INSERT INTO dead_letter_events (event_id, reason) VALUES ($1, 'a'), ($2, 'b')", foreign, discarded
    )
    assert await dead_letters.discard_if_open(connection, discarded, "not wanted")
    before = await connection.fetch("SELECT * FROM dead_letter_events ORDER BY event_id")
    for event_id, why in [(uuid4(), "no such dead letter"), (foreign, "has no outbox row"), (discarded, "was discarded")]:
        with pytest.raises(NotRedrivable, match=f"{event_id}: {why}"):
            await redrive(connection, event_id)
    assert await connection.fetch("SELECT * FROM dead_letter_events ORDER BY event_id") == before
    assert await connection.fetchval("SELECT attempt FROM outbox WHERE event_id = $1", discarded) == 1


async def test_two_people_redrive_the_same_letter(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    await fail_three_times(connection, database_url, event_id)
    other = await asyncpg.connect(database_url, timeout=10)
    try:
        results = await asyncio.gather(redrive(connection, event_id), redrive(other, event_id), return_exceptions=True)
    finally:
        await other.close()
    assert sorted(type(result).__name__ for result in results) == ["NotRedrivable", "RedriveResult"]
    assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 4, None)


async def test_redrive_and_replay_through_relay_and_kafka(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    settings = settings_for(database_url, kafka, topic)
    relay = relay_of(settings, kafka_of(settings), Handoff(), Health())
    worker = worker_of(settings, kafka_of(settings), Health())
    await set_mode(connection, "error")
    with watching() as facts:
        async with running(relay, worker):
            ((order_id, event_id),) = await place(connection)
            await facts.until("DLQ_EVENT", eventId=event_id)
            await set_mode(connection, "succeed")
            await redrive(connection, event_id)
            await facts.until("STATE_CHANGE", orderId=order_id, newState="PAID")
            await settled(connection)
            before = await connection.fetchrow("SELECT * FROM orders")
            # Everything once more, from the first event to the last.
            events = await outbox.select_for_replay(connection, aggregate_id=order_id)
            assert await outbox.replay(connection, events) == 3
            await facts.until("DUPLICATE_EVENT", count=3)
            await settled(connection)
    assert await connection.fetchrow("SELECT * FROM orders") == before
    assert (before["state"], before["version"]) == ("PAID", 5)
    assert await charges_of(connection, order_id) == ["settled"]
    assert await events_of(connection, order_id) == ["OrderCreated", "OrderFailed", "OrderPaid"]
    assert await violations(connection) == {}
