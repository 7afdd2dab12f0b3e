"""Retries, end to end in one process: relay, Kafka, worker and the simulated gateway, with the log lines of the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from orderflow.app import kafka_of, relay_of, worker_of
from orderflow.engine.handoff import Handoff
from orderflow.engine.relay import Relay
from orderflow.engine.worker import Worker
from orderflow.health import Health
from tests.pipeline import Facts, running, settings_for, watching
from tests.rows import charges_of, dead_letter, events_of, message_of, order_row, place, set_mode, settled, states, violations
from tests.servers import Broker
from tests.topics import committed_offsets, records_in, send_again
from tests.waiting import eventually

ERROR = "Payment gateway error: Insufficient funds"


def parts(url: str, broker: Broker, topic: str, **changes: Any) -> tuple[Relay, Worker]:
    """The publisher and the worker as the program makes them."""
    settings = settings_for(url, broker, topic, **changes)
    health = Health()
    return relay_of(settings, kafka_of(settings), Handoff(), health), worker_of(settings, kafka_of(settings), health)


@asynccontextmanager
async def flowing(url: str, broker: Broker, topic: str, **changes: Any) -> AsyncIterator[Facts]:
    with watching() as facts:
        async with running(*parts(url, broker, topic, **changes)):
            yield facts


async def test_three_errors_then_the_dead_letter(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    await set_mode(connection, "error")
    async with flowing(database_url, kafka, topic) as facts:
        ((order_id, event_id),) = await place(connection)
        await facts.until("DLQ_EVENT", eventId=event_id)
        await settled(connection)
    told = [
        (fact.event, fact.fields.get("retryCount"))
        for fact in facts.seen
        if fact.fields.get("eventId") == event_id and fact.event != "EVENT_PUBLISHED"
    ]
    assert told == [
        ("EVENT_RECEIVED", None), ("PROCESSING_ERROR", 1), ("RETRY_SCHEDULED", 1),
        ("EVENT_RECEIVED", None), ("PROCESSING_ERROR", 2), ("RETRY_SCHEDULED", 2),
        ("EVENT_RECEIVED", None), ("PROCESSING_ERROR", 3), ("DLQ_EVENT", None),
    ]  # fmt: skip
    assert {fact["error"] for fact in facts.of("PROCESSING_ERROR")} == {ERROR}
    assert {fact["maxRetries"] for fact in facts.of("RETRY_SCHEDULED")} == {3}
    assert len(facts.of("EVENT_PUBLISHED", eventId=event_id)) == 3
    assert await order_row(connection, order_id) == ("FAILED", 3, "error")
    assert await events_of(connection, order_id) == ["OrderCreated", "OrderFailed"]
    assert await charges_of(connection, order_id) == []
    headers = [dict(record.headers)["attempt"] for record in await records_in(kafka, topic) if event_id.hex in _id_of(record)]
    assert headers == [b"1", b"2", b"3"]
    assert await violations(connection) == {}


def _id_of(record: Any) -> str:
    return dict(record.headers)["event-id"].decode().replace("-", "")


async def test_a_crash_between_attempts_loses_none_and_counts_none_twice(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    await set_mode(connection, "error")
    ((order_id, event_id),) = await place(connection)
    async with flowing(database_url, kafka, topic, backoff_base_ms=60_000, backoff_cap_ms=60_000) as facts:
        await facts.until("RETRY_SCHEDULED", retryCount=1)
    await connection.execute("UPDATE outbox SET available_at = now() WHERE event_id = $1", event_id)
    await set_mode(connection, "succeed")
    async with flowing(database_url, kafka, topic) as facts:
        await settled(connection)
    assert facts.of("PROCESSING_ERROR") == []
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert (await message_of(connection, event_id)).attempt == 2
    assert await charges_of(connection, order_id) == ["settled"]
    assert await violations(connection) == {}


async def test_a_waiting_retry_holds_up_neither_its_partition_nor_its_offsets(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    await set_mode(connection, "error")
    async with flowing(database_url, kafka, topic, backoff_base_ms=3_600_000, backoff_cap_ms=3_600_000) as facts:
        waiting = await place(connection, 5)
        await facts.until("RETRY_SCHEDULED", count=5)
        await set_mode(connection, "succeed")
        await place(connection, 20)
        await facts.until("PAYMENT_RESULT", count=20)
    assert await states(connection) == {"PAID": 20, "PAYMENT_PENDING": 5}
    assert sum((await committed_offsets(kafka, topic)).values()) >= 25
    assert {order_id for order_id, _ in waiting} == {
        row["id"] for row in await connection.fetch("SELECT id FROM orders WHERE state = 'PAYMENT_PENDING'")
    }


async def test_every_mode_at_once_ends_every_order(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    async with flowing(database_url, kafka, topic, gateway_timeout_ms=300, backoff_base_ms=20) as facts:
        for number, mode in enumerate(["random", "succeed", "decline", "error", "timeout", "hang"]):
            await set_mode(connection, mode)
            placed = await place(connection, 20)
            orders = {order_id for order_id, _ in placed}
            # The mode has been looked up by the time at which an order has had its first answer, or its first silence.
            await eventually(lambda orders=orders: _answered(facts, orders), 30, what=f"{mode} has answered ({number})")
        await set_mode(connection, "random")
        await settled(connection)
    assert sum((await states(connection)).values()) == 120
    assert await violations(connection) == {}


def _answered(facts: Facts, orders: set[Any]) -> bool:
    events = {fact["aggregateId"]: fact["eventId"] for fact in facts.of("EVENT_PUBLISHED", eventType="OrderCreated")}
    answered = {fact["orderId"] for fact in facts.of("PAYMENT_RESULT")}
    failed = {fact["eventId"] for fact in facts.of("PROCESSING_ERROR")}
    return all(order_id in answered or events.get(order_id) in failed for order_id in orders)


async def test_delivered_again_by_somebody_else_while_it_is_being_retried(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    await set_mode(connection, "error")
    ((order_id, event_id),) = await place(connection)
    first = await message_of(connection, event_id)
    async with flowing(database_url, kafka, topic, backoff_base_ms=3_600_000, backoff_cap_ms=3_600_000) as facts:
        await facts.until("RETRY_SCHEDULED", retryCount=1)
        # The same record twice more: an older attempt than the row's counts no failure and makes no charge.
        for _ in range(2):
            await send_again(kafka, topic, first)
        await facts.until("DUPLICATE_EVENT", count=2, eventId=event_id)
        assert len(facts.of("PROCESSING_ERROR")) == 1
        assert await dead_letter(connection, event_id) is None
        assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 2, None)
