"""What a writer commits beside a waiting relay is published without being read back, and is the same record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from orderflow.engine import outbox, relay
from orderflow.engine.handoff import MOST, Handoff
from orderflow.engine.low_water import Positions
from orderflow.engine.message import Message
from orderflow.engine.outbox import Due
from orderflow.engine.relay import Relay
from orderflow.engine.shards import SHARD_LOCK, Shards
from orderflow.orders.service import OrderService
from orderflow.orders.store import NewOrder, Placed, announced
from tests.pipeline import Facts, kafka_for, opening, running, watching
from tests.rows import insert_event
from tests.servers import Broker
from tests.topics import records_in
from tests.waiting import eventually

NEVER = 3600.0
NOW = datetime.now(UTC)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@asynccontextmanager
async def relaying(
    connection: asyncpg.Connection, url: str, broker: Broker, topic: str, handoffs: list[Handoff], poll: float = NEVER
) -> AsyncIterator[Facts]:
    """A relay for each handoff, that hears of nothing by a notification and, unless told to, never polls."""
    await connection.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_wake")
    kafka = kafka_for(broker, topic)
    with watching() as facts:
        async with running(*(Relay(opening(url), url, kafka, handoff, poll=poll) for handoff in handoffs)):
            await facts.until("STARTUP", count=len(handoffs))
            yield facts


@asynccontextmanager
async def placing(url: str, handoff: Handoff) -> AsyncIterator[OrderService]:
    database = await opening(url)()
    service = OrderService(database, handoff=handoff)
    try:
        yield service
    finally:
        await service.close()
        await database.close()


async def placed(service: OrderService, amount: str = "10.50") -> Placed:
    result = await service.place(uuid4(), Decimal(amount), traceparent=TRACE)
    assert isinstance(result, Placed)
    return result


async def test_a_waiting_relay_publishes_what_it_is_handed_and_marks_it(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    handoff, ids = Handoff(), []
    async with (
        placing(database_url, handoff) as service,
        relaying(connection, database_url, kafka, topic, [handoff]) as facts,
    ):
        for number in range(1, 4):
            await eventually(lambda: handoff.is_wanted, what="the relay waits")
            ids.append((await placed(service)).order_id)
            await facts.until("EVENT_PUBLISHED", count=number)
        await eventually(lambda: nothing_due(connection), what="all are marked")
    assert [fact["aggregateId"] for fact in facts.of("EVENT_PUBLISHED")] == ids
    assert sorted(record.key.decode() for record in await records_in(kafka, topic)) == sorted(map(str, ids))


async def nothing_due(connection: asyncpg.Connection) -> bool:
    return not await connection.fetchval("SELECT count(*) FROM outbox WHERE published_at IS NULL")


@pytest.mark.parametrize("amount", ["0.01", "10.50", "12", "99999999.99"])
async def test_what_is_handed_over_is_byte_for_byte_what_would_be_read(database_url: str, amount: str) -> None:
    handoff = Handoff()
    async with placing(database_url, handoff) as service:
        with handoff.wanted(True) as messages:
            await placed(service, amount)
        (message,) = messages
        database = await opening(database_url)()
        read = await outbox.get(database, message.id)
        await database.close()
    assert read is not None
    assert message.encode() == read.encode()


async def test_what_is_handed_over_needs_no_reading_and_what_is_not_is_read_after_it(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    handoff = Handoff()
    ghost = announced(
        [NewOrder(uuid4(), uuid4(), uuid4(), Decimal("1.00"))],
        [Placed(uuid4(), uuid4(), Decimal("1.00"), NOW)],
    )
    async with relaying(connection, database_url, kafka, topic, [handoff]) as facts:
        await eventually(lambda: handoff.is_wanted, what="the relay waits")
        written = await insert_event(connection)
        # Of this one there is no row: whoever reads does not find it.
        handoff.committed(lambda: ghost)
        await facts.until("EVENT_PUBLISHED", count=2)
    assert [fact["eventId"] for fact in facts.of("EVENT_PUBLISHED")] == [ghost[0].id, written]
    assert len(await records_in(kafka, topic)) == 2


def never() -> list[Message]:
    raise AssertionError("asked for what may be another relay's")


async def test_a_relay_of_some_shards_is_handed_nothing_and_is_woken() -> None:
    handoff = Handoff()
    with handoff.wanted(False) as handed:
        handoff.committed(never)
    assert handed == []
    assert handoff.woken.is_set()


async def test_relays_that_share_the_shards_are_handed_nothing_and_are_woken(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    handoffs = [Handoff(), Handoff()]
    async with relaying(connection, database_url, kafka, topic, handoffs, poll=0.1) as facts:
        await eventually(lambda: owners(connection, 2), what="both own shards")
        await eventually(lambda: not any(handoff.is_wanted for handoff in handoffs), what="neither wants anything")
        await insert_event(connection)
        for handoff in handoffs:
            handoff.committed(never)
        await facts.until("EVENT_PUBLISHED")


async def owners(connection: asyncpg.Connection, count: int) -> bool:
    found = await connection.fetchval(
        "SELECT count(DISTINCT pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        SHARD_LOCK,
    )
    return bool(found == count)


async def test_what_is_committed_during_a_round_is_not_slept_over(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, go_on = asyncio.Event(), asyncio.Event()
    fetch = Positions.fetch

    async def held(positions: Positions, *arguments: Any) -> Due:
        due = await fetch(positions, *arguments)
        looked.set()
        await go_on.wait()
        return due

    handoff = Handoff()
    async with relaying(connection, database_url, kafka, topic, [handoff]) as facts:
        await eventually(lambda: listens(connection), what="the relay's other connection has nothing more to say")
        await eventually(lambda: handoff.is_wanted and not handoff.woken.is_set(), what="the relay waits")
        monkeypatch.setattr(Positions, "fetch", held)
        handoff.woken.set()
        await asyncio.wait_for(looked.wait(), 30)
        # Behind its back: what it has looked at is without this one.
        written = await insert_event(connection)
        handoff.woken.set()
        go_on.set()
        await facts.until("EVENT_PUBLISHED", eventId=written)


async def listens(connection: asyncpg.Connection) -> bool:
    return await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'orderflow wake' AND state = 'idle' AND query LIKE 'LISTEN%')"
    )


async def test_a_relay_that_lost_its_shards_in_its_sleep_publishes_nothing_that_it_is_handed(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Shards] = []

    class Noted(Shards):
        def __init__(self, url: str) -> None:
            super().__init__(url)
            made.append(self)

    monkeypatch.setattr(relay, "Shards", Noted)
    handoff = Handoff()
    ghost = announced(
        [NewOrder(uuid4(), uuid4(), uuid4(), Decimal("1.00"))],
        [Placed(uuid4(), uuid4(), Decimal("1.00"), NOW)],
    )
    async with relaying(connection, database_url, kafka, topic, [handoff]) as facts:
        await eventually(lambda: handoff.is_wanted, what="the relay waits")
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'orderflow shards'"
        )
        await eventually(lambda: not made[0].owned, what="its session has ended")
        # Of this one there is no row: only a relay that takes what it is handed publishes it.
        handoff.committed(lambda: ghost)

        def owns_again() -> bool:
            handoff.woken.set()
            return bool(made[0].owned)

        await eventually(owns_again, what="it has shards again")
        written = await insert_event(connection)
        handoff.committed(list)
        await facts.until("EVENT_PUBLISHED", eventId=written)
    assert [fact["eventId"] for fact in facts.of("EVENT_PUBLISHED")] == [written]


async def test_a_relay_at_work_is_handed_nothing_and_no_list_grows_without_a_bound() -> None:
    handoff = Handoff()
    message = announced([NewOrder(uuid4(), uuid4(), uuid4(), Decimal(1))], [Placed(uuid4(), uuid4(), Decimal(1), NOW)])
    handoff.committed(lambda: message)
    assert handoff.woken.is_set()
    with handoff.wanted(True) as first:
        for _ in range(3 * MOST):
            handoff.committed(lambda: message)
    handoff.committed(lambda: message)
    with handoff.wanted(True) as second:
        await asyncio.sleep(0)
    assert (len(first), len(second)) == (MOST, 0)
