"""How far the group has consumed, asked of a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest_asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from orderflow.engine.consumed import consumed_until
from orderflow.engine.kafka import Kafka
from tests.servers import Broker

BEGIN = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)


@pytest_asyncio.fixture
async def cluster(kafka: Broker, topic: str) -> Kafka:
    return Kafka(kafka.bootstrap, topic=topic, group=topic)


@pytest_asyncio.fixture
async def group(cluster: Kafka) -> AsyncIterator[AIOKafkaConsumer]:
    """For commits as the workers make them; a member of no group."""
    consumer = AIOKafkaConsumer(bootstrap_servers=cluster.bootstrap, group_id=cluster.group, enable_auto_commit=False)
    await consumer.start()
    consumer.assign([TopicPartition(cluster.topic, at) for at in range(await cluster.ensure_topic())])
    yield consumer
    await consumer.stop()


async def produce(cluster: Kafka, partition: int, minutes: list[int]) -> None:
    """Records of an hour ago and so many minutes later."""
    async with AIOKafkaProducer(bootstrap_servers=cluster.bootstrap) as producer:
        for minute in minutes:
            at = int((BEGIN + timedelta(minutes=minute)).timestamp() * 1000)
            await producer.send_and_wait(cluster.topic, b"x" * 2000, partition=partition, timestamp_ms=at)


async def test_an_empty_topic_is_consumed_until_now(cluster: Kafka) -> None:
    before = datetime.now(UTC)
    assert await consumed_until(cluster) >= before


async def test_what_nobody_ever_consumed_waits_from_its_first_record(cluster: Kafka) -> None:
    await produce(cluster, 0, [3, 4])
    await produce(cluster, 1, [2, 9])
    assert await consumed_until(cluster) == BEGIN + timedelta(minutes=2)


async def test_the_partition_that_is_furthest_behind_decides(cluster: Kafka, group: AIOKafkaConsumer) -> None:
    await produce(cluster, 0, [1, 2, 3])
    await produce(cluster, 1, [1, 2, 5])
    await group.commit({TopicPartition(cluster.topic, 0): 1, TopicPartition(cluster.topic, 1): 2})
    assert await consumed_until(cluster) == BEGIN + timedelta(minutes=2)
    await group.commit({TopicPartition(cluster.topic, 0): 3})
    assert await consumed_until(cluster) == BEGIN + timedelta(minutes=5)
    await group.commit({TopicPartition(cluster.topic, 1): 3})
    assert await consumed_until(cluster) > BEGIN + timedelta(minutes=30)


async def test_offsets_of_a_topic_that_was_made_anew_are_none(cluster: Kafka, group: AIOKafkaConsumer) -> None:
    await produce(cluster, 0, [7])
    await group.commit({TopicPartition(cluster.topic, 0): 900})
    assert await consumed_until(cluster) == BEGIN + timedelta(minutes=7)
