"""Stalls of the relay and the worker: what hangs is found and started again; what merely takes its time is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from aiokafka.consumer.fetcher import Fetcher

from orderflow.app import stall_of
from orderflow.embedded.kafka import ApacheKafka
from orderflow.engine import processed, seams
from orderflow.engine.circuit import Circuit
from orderflow.engine.handoff import Handoff
from orderflow.engine.patience import DependencyUnavailable, is_transient
from orderflow.engine.relay import Relay
from orderflow.engine.watchdog import Stalled
from orderflow.payments.handlers import SUBJECTS, ChargeHandler
from orderflow.supervisor import Service
from tests.pipeline import Facts, FakeGateway, kafka_for, opened, opening, running, settings_for, watching, worker_with
from tests.rows import insert_event, place, settled, states
from tests.servers import Broker
from tests.waiting import eventually

LIMIT = 1.0
FOR_EVER = "before=delay(3600)"


class Restarted:
    """A role that is started again after a stall, as the supervisor does; `stalls` counts them."""

    def __init__(self, role: Service) -> None:
        self.name = role.name
        self.stalls = 0
        self._role = role

    async def run(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                await self._role.run(stopping)
            except Stalled:
                self.stalls += 1
            except DependencyUnavailable:
                await asyncio.sleep(0.1)


def relay_on(url: str, broker: Broker, topic: str) -> Restarted:
    return Restarted(Relay(opening(url, by_index=True), url, kafka_for(broker, topic), Handoff(), poll=0.2, stall=LIMIT))


@asynccontextmanager
async def worker_on(
    url: str, broker: Broker, topic: str, gateway: FakeGateway | None = None, timeout: float = 5.0, **options: Any
) -> AsyncIterator[Restarted]:
    async with opened(url) as database:
        circuit = Circuit(database, "gateway", worker_id="w", failures=0)
        charge = ChargeHandler(database, gateway or FakeGateway(), circuit, worker_id="w", timeout=timeout)
        options = {"subjects": SUBJECTS, "stall": LIMIT, **options}
        try:
            yield Restarted(worker_with({"OrderCreated": charge}, url, kafka_for(broker, topic), **options))
        finally:
            await charge.close()


@asynccontextmanager
async def armed(plan: str) -> AsyncIterator[Facts]:
    """A plan of failpoints for the length of the block; what is told meanwhile."""
    disarm = seams.arm(plan)
    try:
        with watching() as facts:
            yield facts
    finally:
        disarm()


@pytest.mark.parametrize("seam", ["publishing.send", "low_water.fetch", "outbox.mark_published_if_attempt", "relay._sleep"])
async def test_a_relay_that_hangs_is_started_again_and_publishes(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, seam: str
) -> None:
    relay = relay_on(database_url, kafka, topic)
    async with armed(f"{seam}.{FOR_EVER}@3") as facts, running(relay):
        # One after the other, until the third passage has come, with work or without.
        while not relay.stalls:
            event_id = await insert_event(connection)
            await facts.until("EVENT_PUBLISHED", eventId=event_id, timeout=60)
            await eventually(lambda: connection.fetchval("SELECT bool_and(published_at IS NOT NULL) FROM outbox"), 60)
    assert relay.stalls == 1
    (told,) = facts.of("STALLED")
    assert (told["role"], told["due"].partition(", ")[0]) == ("publisher", "1 events are due")
    assert told["seconds"] >= LIMIT


@pytest.mark.parametrize("hangs", ["in the fetch", "in silence"])
async def test_a_worker_whose_fetch_hangs_is_started_again_and_consumes(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, hangs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hangs == "in silence":
        # aiokafka #1037: the client's own task has ended, and nobody is told.
        begun = asyncio.Event()
        original = Fetcher._fetch_requests_routine

        async def routine(self: Any) -> None:
            if begun.is_set():
                await original(self)
            begun.set()

        monkeypatch.setattr(Fetcher, "_fetch_requests_routine", routine)
    plan = f"consumer._fetch.{FOR_EVER}@2" if hangs == "in the fetch" else ""
    relay = relay_on(database_url, kafka, topic)
    async with worker_on(database_url, kafka, topic) as worker, armed(plan) as facts, running(relay, worker):
        await place(connection, 20)
        await settled(connection)
    assert worker.stalls == 1
    (told,) = facts.of("STALLED")
    assert told["role"] == "worker"
    assert "records wait in" in told["due"]
    assert await states(connection) == {"PAID": 20}


async def test_deliveries_that_hang_beyond_their_time_are_begun_again(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    plan, relay = f"handlers._settle.{FOR_EVER}@1", relay_on(database_url, kafka, topic)
    async with (
        worker_on(database_url, kafka, topic, delivery_limit=0.5) as worker,
        armed(plan) as facts,
        running(relay, worker),
    ):
        await place(connection)
        await settled(connection)
    assert worker.stalls == 1
    assert facts.of("STALLED")[0]["due"] == "1 deliveries are in flight"
    assert await states(connection) == {"PAID": 1}


async def test_a_slow_gateway_and_a_paused_partition_are_no_stall(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    gateway = FakeGateway()

    async def slow(request: Any) -> Any:
        await asyncio.sleep(LIMIT * 3)
        return gateway.book(request)

    gateway.on_charge = slow
    # One a partition at a time: the others wait in partitions that are paused.
    async with worker_on(database_url, kafka, topic, gateway, timeout=60.0, max_in_flight=4, delivery_limit=60.0) as worker:
        with watching() as facts:
            async with running(relay_on(database_url, kafka, topic), worker):
                await place(connection, 8)
                await settled(connection)
    assert (worker.stalls, facts.of("STALLED")) == (0, [])


async def test_a_locked_table_is_no_stall(connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str) -> None:
    gateway, charged, gate = FakeGateway(), asyncio.Event(), asyncio.Event()

    async def held(request: Any) -> Any:
        charged.set()
        await gate.wait()
        return gateway.book(request)

    gateway.on_charge = held
    async with worker_on(database_url, kafka, topic, gateway, timeout=60.0, delivery_limit=0.1) as worker:
        with watching() as facts:
            async with running(relay_on(database_url, kafka, topic), worker):
                await place(connection)
                await asyncio.wait_for(charged.wait(), 30)
                async with connection.transaction():
                    await connection.execute("LOCK TABLE orders IN EXCLUSIVE MODE")
                    gate.set()
                    await asyncio.sleep(LIMIT * 4)
                await settled(connection)
    assert (worker.stalls, facts.of("STALLED")) == (0, [])


async def test_an_idle_relay_is_no_stall_whatever_the_age_of_what_comes(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    relay = relay_on(database_url, kafka, topic)
    with watching() as facts:
        async with running(relay):
            await facts.until("STARTUP")
            await asyncio.sleep(LIMIT * 2)
            await connection.execute(
                "INSERT INTO outbox (event_type, aggregate_id, created_at) VALUES ('Old', gen_random_uuid(), '2001-01-01')"
            )
            await facts.until("EVENT_PUBLISHED")
            await asyncio.sleep(LIMIT * 2)
    assert (relay.stalls, facts.of("STALLED")) == (0, [])


async def test_kafka_that_stands_still_is_no_stall_of_the_worker(
    connection: asyncpg.Connection, database_url: str, restartable_kafka: ApacheKafka
) -> None:
    topic = "still"
    async with worker_on(database_url, restartable_kafka, topic) as worker:
        with watching() as facts:
            async with running(relay_on(database_url, restartable_kafka, topic), worker):
                await facts.until("ASSIGNED")
                await place(connection)
                await settled(connection)
                await restartable_kafka.pause()
                await asyncio.sleep(LIMIT * 4)
                await restartable_kafka.resume()
                await place(connection)
                await settled(connection)
    assert (worker.stalls, facts.of("STALLED", role="worker")) == (0, [])


@pytest.mark.parametrize("obstacle", [
    "LOCK TABLE orders IN EXCLUSIVE MODE", "LOCK TABLE processed_events IN SHARE MODE", "LOCK TABLE outbox",
])  # fmt: skip
async def test_whether_a_delivery_could_be_settled(connection: asyncpg.Connection, database_url: str, obstacle: str) -> None:
    async with opened(database_url, timeout=0.3, size=1) as database:
        await processed.refuse_unless_writable(database, ["orders"])
        async with connection.transaction():
            await connection.execute(obstacle)
            with pytest.raises(Exception) as raised:
                await processed.refuse_unless_writable(database, ["orders"])
            assert is_transient(raised.value)
        await processed.refuse_unless_writable(database, ["orders"])
        await database.pool.execute("SET default_transaction_read_only = on")
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await processed.refuse_unless_writable(database, ["orders"])


def test_the_limit_is_never_shorter_than_a_server_s_own_error_takes(kafka: Broker) -> None:
    assert stall_of(settings_for("postgresql://h/d", kafka, "t")) == 30.0
    assert stall_of(settings_for("postgresql://h/d", kafka, "t", kafka_timeout_seconds=60.0)) == 130.0
