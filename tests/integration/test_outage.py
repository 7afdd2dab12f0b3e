"""The gateway is away for a while: few calls are made, no attempt is used up, and in the end every order has one charge."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import asyncpg

from orderflow.app import kafka_of, relay_of, worker_of
from orderflow.engine.handoff import Handoff
from orderflow.engine.relay import Relay
from orderflow.engine.worker import Worker
from orderflow.health import Health
from tests.pipeline import Facts, running, settings_for, watching
from tests.rows import place, set_mode, settled, states, violations
from tests.servers import Broker
from tests.waiting import eventually

FEW = 200


def parts(url: str, broker: Broker, topic: str, *workers: str) -> list[Relay | Worker]:
    """A publisher, and the workers of these names."""
    made: list[Any] = []
    for name in workers:
        settings = settings_for(url, broker, topic, worker_id=name)
        made.append(worker_of(settings, kafka_of(settings), Health()))
    return [relay_of(settings, kafka_of(settings), Handoff(), Health()), *made]


async def probes(connection: asyncpg.Connection) -> int:
    return await connection.fetchval("SELECT probes FROM circuits") or 0


async def attempted(connection: asyncpg.Connection) -> int:
    return await connection.fetchval("SELECT count(*) FROM outbox WHERE attempt <> first_attempt OR failures IS NOT NULL")


async def one_charge_each(connection: asyncpg.Connection, orders: int) -> None:
    """All of them have ended, with one entry in the gateway's books each."""
    assert set(await states(connection)) <= {"PAID", "FAILED"}
    counts = await connection.fetchrow("SELECT count(*), count(DISTINCT reference) FROM gateway_charges")
    assert tuple(counts) == (orders, orders)
    assert await violations(connection) == {}


async def test_calls_are_few_and_no_attempt_is_used_up(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    await set_mode(connection, "unavailable")
    with watching() as facts:
        async with running(*parts(database_url, kafka, topic, "w1")):
            first = {event_id for _, event_id in await place(connection, FEW)}
            await facts.until("CIRCUIT_OPENED")
            await eventually(lambda: first <= put_off(facts), 30, what="each is put off")
            in_flight, probed = len(facts.of("GATEWAY_UNANSWERED")), await probes(connection)
            # At the most each once: what was on its way already when the first of them had no answer.
            assert in_flight <= FEW + probed
            later = {event_id for _, event_id in await place(connection, FEW)}
            await eventually(lambda: later <= put_off(facts), 30, what="each is put off")
            # While all 400 orders come and go, the gateway is asked by the probes alone.
            await eventually(lambda: more_probes(connection, probed + 2), 30, what="two more probes")
            assert len(facts.of("GATEWAY_UNANSWERED")) - in_flight <= await probes(connection) - probed + 1
            assert set(await states(connection)) == {"CREATED", "PAYMENT_PENDING"}
            assert await attempted(connection) == 0
            await set_mode(connection, "random")
            await settled(connection, 90)
    assert await attempted(connection) == 0
    assert len(facts.of("CIRCUIT_OPENED")) == len(facts.of("CIRCUIT_CLOSED")) == 1
    assert facts.of("PROCESSING_ERROR") + facts.of("DLQ_EVENT") == []
    await one_charge_each(connection, 2 * FEW)


def put_off(facts: Facts) -> set[UUID]:
    return {fact["eventId"] for fact in facts.of("EVENT_POSTPONED")}


async def more_probes(connection: asyncpg.Connection, wanted: int) -> bool:
    return await probes(connection) >= wanted


async def test_two_workers_share_it(connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str) -> None:
    with watching() as facts:
        async with running(*parts(database_url, kafka, topic, "w1", "w2")):
            await facts.until("STARTUP", service="payment-worker", count=2)
            for _ in range(2):
                closed = len(facts.of("CIRCUIT_CLOSED"))
                await set_mode(connection, "unavailable")
                await place(connection, FEW)
                await facts.until("CIRCUIT_OPENED", count=closed + 1)
                await set_mode(connection, "random")
                await facts.until("CIRCUIT_CLOSED", count=closed + 1)
            await settled(connection, 90)
    assert facts.of("PROCESSING_ERROR") == []
    assert await attempted(connection) == 0
    await one_charge_each(connection, 2 * FEW)


async def test_answers_that_are_lost_or_bad_are_answers(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    with watching() as facts:
        async with running(*parts(database_url, kafka, topic, "w1")):
            for mode in ("timeout", "error", "decline"):
                await set_mode(connection, mode)
                await place(connection, FEW)
                await settled(connection)
    assert facts.of("CIRCUIT_OPENED") == []
    assert len(facts.of("DLQ_EVENT", reason="Max retries exceeded (3)")) == FEW
    assert await violations(connection) == {}
