"""The topic vanishes under a running relay and worker: it comes back as it was configured, and the work goes on."""

from __future__ import annotations

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from orderflow.embedded.kafka import ApacheKafka
from orderflow.engine.metadata import making_no_topic
from tests.integration.test_relay import Restarted, relay_on
from tests.pipeline import kafka_for, running, watching, worker_with
from tests.rows import insert_event
from tests.servers import Broker
from tests.waiting import eventually

# Of `kafka_for`; a broker that makes a topic by itself makes it with one.
PARTITIONS = 4


@pytest.fixture
def real(kafka: Broker) -> Broker:
    """A Kafka with its defaults: it makes every topic that somebody asks for."""
    if not isinstance(kafka, ApacheKafka):
        pytest.skip("the mock broker deletes no topic")
    return kafka


async def test_it_is_made_anew_with_all_its_partitions(
    connection: asyncpg.Connection, database_url: str, real: Broker, topic: str
) -> None:
    kafka = kafka_for(real, topic)
    with watching() as facts:
        parts = (Restarted(relay_on(database_url, real, topic)), Restarted(worker_with({}, database_url, kafka)))
        async with running(*parts):
            await insert_event(connection)
            await facts.until("EVENT_PROCESSED", count=1)
            await delete(real, topic)
            await insert_event(connection)
            await facts.until("EVENT_PROCESSED", count=2)
    assert await partitions_of(real, topic) == PARTITIONS


async def test_other_clients_of_this_process_may_make_topics(real: Broker, topic: str) -> None:
    names = {False: f"{topic}-ours", True: f"{topic}-theirs"}
    for theirs, name in names.items():
        producer = AIOKafkaProducer(bootstrap_servers=real.bootstrap, request_timeout_ms=500)
        if theirs:
            await producer.start()
        else:
            with making_no_topic():
                await producer.start()
        try:
            await producer.client.add_topic(name)
        finally:
            await producer.stop()

    async def is_made() -> bool:
        return await partitions_of(real, names[True]) == 1

    await eventually(is_made, what="the broker has made theirs")
    assert await partitions_of(real, names[False]) == 0


async def delete(broker: Broker, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        await admin.delete_topics([topic])
    finally:
        await admin.close()


async def partitions_of(broker: Broker, topic: str) -> int:
    """0 where there is none; asked of all topics, as to ask for one would make it."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        described = {one["topic"]: len(one["partitions"]) for one in await admin.describe_topics()}
    finally:
        await admin.close()
    return described.get(topic, 0)
