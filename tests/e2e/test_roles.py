"""The program as processes: roles split, servers that are not there yet, settings that are wrong, an orderly end."""

from __future__ import annotations

import re

import aiohttp
import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from orderflow.embedded.kafka import ApacheKafka
from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.engine.telemetry import API, PUBLISHER, WORKER
from tests.fleet import Client, Fleet, api_of
from tests.rows import set_mode, settled, states, violations
from tests.servers import Broker
from tests.topics import committed_offsets, records_in


async def test_each_role_in_a_process_of_its_own(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    client = Client()
    async with Fleet(database_url, kafka, topic) as fleet:
        api, publisher, worker = [await fleet.run("--role", role) for role in ("api", "publisher", "worker")]
        address = await api_of(api)
        await client.place_many(address, 30)
        await settled(connection)
        for process in fleet.processes:
            process.stop()
        assert [await process.end() for process in fleet.processes] == [0, 0, 0]
    assert sum((await states(connection)).values()) == 30
    assert await violations(connection, client.accepted) == {}
    # Every process has spoken of its own role's work only, in lines of JSON and nothing else.
    assert [process.said for process in fleet.processes] == [[], [], []]
    assert len(publisher.facts.of("EVENT_PUBLISHED", service=PUBLISHER)) == 60
    assert len(worker.facts.of("PAYMENT_RESULT", service=WORKER)) == 30
    assert len(worker.facts.of("EVENT_RECEIVED", service=WORKER)) == 60
    assert api.facts.of("EVENT_PUBLISHED") + worker.facts.of("EVENT_PUBLISHED") + publisher.facts.of("EVENT_RECEIVED") == []
    stamp = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
    assert all(stamp.match(fact.fields["timestamp"]) for process in fleet.processes for fact in process.facts.seen)


async def test_a_stop_finishes_the_payments_in_flight(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    await set_mode(connection, "succeed")
    client = Client()
    async with Fleet(database_url, kafka, topic, ORDERFLOW_GATEWAY_DELAY_MS="1500") as fleet:
        rest = await fleet.run("--role", "api", "--role", "publisher")
        worker = await fleet.run("--role", "worker")
        await worker.facts.until("STARTUP", service=WORKER)
        await client.place_many(await api_of(rest), 25)
        await worker.facts.until("STATE_CHANGE", count=25, newState="PAYMENT_PENDING")
        worker.stop()
        assert await worker.end() == 0
    assert await states(connection) == {"PAID": 25}
    assert len(worker.facts.of("PAYMENT_RESULT", status="SUCCESS")) == 25
    assert [fact.event for fact in worker.facts.seen].count("DRAINING") == 1
    assert worker.errors == []
    # What was settled is committed: the next worker does not get it again.
    created = [record for record in await records_in(kafka, topic) if dict(record.headers)["event-type"] == b"OrderCreated"]
    committed = await committed_offsets(kafka, topic)
    assert all(record.offset < committed[record.partition] for record in created)


async def test_kafka_comes_later_and_the_topic_is_made(
    connection: asyncpg.Connection, database_url: str, restartable_kafka: ApacheKafka
) -> None:
    await restartable_kafka.stop()
    client = Client()
    async with Fleet(database_url, restartable_kafka, "made-by-us", ORDERFLOW_TOPIC_PARTITIONS="3") as fleet:
        process = await fleet.run()
        address = await api_of(process)
        await client.place_many(address, 10)
        await process.facts.until("ROLE_WAITING", role="publisher")
        await process.facts.until("ROLE_WAITING", role="worker")
        reason = process.facts.of("ROLE_WAITING", role="worker")[0]["reason"]
        assert restartable_kafka.bootstrap in reason
        assert "KAFKA_BOOTSTRAP_SERVERS" in reason
        assert await states(connection) == {"CREATED": 10}
        # Not ready yet, and yet orders were accepted.
        async with aiohttp.ClientSession() as session, session.get(f"{address}/readyz") as response:
            assert response.status == 503
        await restartable_kafka.start()
        await settled(connection)
        process.stop()
        assert await process.end() == 0
    assert await violations(connection, client.accepted) == {}
    # Said once a role, however often it was tried.
    assert len(process.facts.of("ROLE_WAITING")) == 2
    assert len({record.partition for record in await records_in(restartable_kafka, "made-by-us")} - {0, 1, 2}) == 0
    admin = AIOKafkaAdminClient(bootstrap_servers=restartable_kafka.bootstrap)
    await admin.start()
    try:
        assert len((await admin.describe_topics(["made-by-us"]))[0]["partitions"]) == 3
    finally:
        await admin.close()


async def test_postgres_comes_later(restartable_postgres: EmbeddedPostgres, kafka: Broker, topic: str) -> None:
    await restartable_postgres.stop()
    client = Client()
    async with Fleet(restartable_postgres.url, kafka, topic) as fleet:
        process = await fleet.run()
        for role in ("api", "publisher", "worker"):
            await process.facts.until("ROLE_WAITING", role=role)
        assert "PostgreSQL at 127.0.0.1" in process.facts.of("ROLE_WAITING", role="worker")[0]["reason"]
        await restartable_postgres.start()
        await client.place_many(await api_of(process), 10)
        connection = await asyncpg.connect(restartable_postgres.url, timeout=10)
        try:
            await settled(connection)
            assert await violations(connection, client.accepted) == {}
        finally:
            await connection.close()
        process.stop()
        assert await process.end() == 0
    said: dict[str, list[str]] = {}
    for fact in process.facts.of("ROLE_WAITING"):
        said.setdefault(fact["role"], []).append(fact["reason"])
    # One line a role and a reason: the server may still say once that it is starting up.
    assert all(len(reasons) == len(set(reasons)) for reasons in said.values()), said
    assert process.facts.of("ROLE_CRASHED") == []


async def test_a_topic_with_one_partition(connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str) -> None:
    if not isinstance(kafka, ApacheKafka):
        pytest.skip("the mock broker makes its topics itself")
    single = f"single-{topic}"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(single, 1, 1)])
    finally:
        await admin.close()
    client = Client()
    async with Fleet(database_url, kafka, single) as fleet:
        process = await fleet.run()
        await client.place_many(await api_of(process), 20)
        await settled(connection)
        process.stop()
        assert await process.end() == 0
    assert await violations(connection, client.accepted) == {}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("app_password", "guess"), ["refuses user 'app_user'", "DATABASE_URL"]),
        (("/test_", "/nowhere_"), ["has no database 'nowhere_", "DATABASE_URL"]),
    ],
    ids=["password", "database"],
)
async def test_wrong_settings_end_it_with_one_clear_line(
    database_url: str, kafka: Broker, topic: str, wrong: tuple[str, str], words: list[str]
) -> None:
    async with Fleet(database_url.replace(*wrong), kafka, topic) as fleet:
        process = await fleet.run()
        assert await process.end() == 1
    assert len(process.errors) == 1, process.errors or process.facts.seen
    assert all(word in process.errors[0] for word in words)
    assert "guess" not in process.errors[0]
    assert process.facts.of("STARTUP", service=API) == []


async def test_a_database_without_the_schema(postgres: EmbeddedPostgres, database_url: str, kafka: Broker, topic: str) -> None:
    connection = await asyncpg.connect(database_url, timeout=10)
    try:
        await connection.execute("DROP TABLE schema_version")
    finally:
        await connection.close()
    async with Fleet(database_url, kafka, topic) as fleet:
        process = await fleet.run("--role", "worker")
        assert await process.end() == 1
    assert process.errors == ["orderflow: the database has no orderflow schema: run `orderflow migrate`"]
