"""A test's broker: records put into Kafka behind the relay's back, and what stands there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from orderflow.engine.message import Message
from tests.pipeline import PATIENCE
from tests.servers import Broker
from tests.waiting import eventually


@asynccontextmanager
async def producing(broker: Broker) -> AsyncIterator[AIOKafkaProducer]:
    """A producer that stands for somebody else's."""
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, acks="all", max_request_size=2_000_000)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def send_again(broker: Broker, topic: str, message: Message, **changes: Any) -> None:
    """Put an event into Kafka as the relay would, behind the relay's back."""
    key, value, headers = message.encode()
    async with producing(broker) as producer:
        await producer.send_and_wait(topic, **{"key": key, "value": value, "headers": headers, **changes})


async def records_in(broker: Broker, topic: str) -> list[Any]:
    """Every record in the topic now, partition by partition."""
    consumer = AIOKafkaConsumer(bootstrap_servers=broker.bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    try:
        await consumer._client.force_metadata_update()
        consumer.assign([TopicPartition(topic, number) for number in await _partitions(broker, topic)])
        ends = await consumer.end_offsets(consumer.assignment())
        found: list[Any] = []
        async with asyncio.timeout(PATIENCE):
            while len(found) < sum(ends.values()):
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found.extend(records)
        return found
    finally:
        await consumer.stop()


async def _partitions(broker: Broker, topic: str) -> list[int]:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        described = await admin.describe_topics([topic])
        return [partition["partition"] for partition in described[0]["partitions"]]
    finally:
        await admin.close()


async def committed_offsets(broker: Broker, topic: str, group: str | None = None) -> dict[int, int]:
    """What the group (by default, the one named like the topic) has committed, by partition."""
    consumer = AIOKafkaConsumer(bootstrap_servers=broker.bootstrap, group_id=group or topic, enable_auto_commit=False)
    await consumer.start()
    try:
        places = [TopicPartition(topic, number) for number in await _partitions(broker, topic)]
        consumer.assign(places)
        found = {place.partition: await consumer.committed(place) for place in places}
    finally:
        await consumer.stop()
    return {partition: offset for partition, offset in found.items() if offset is not None}


async def limited_to(broker: Broker, topic: str, size: int) -> None:
    """Have the topic refuse batches of more bytes; returns when the broker, which answers before, knows topic and limit."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()

    async def is_known() -> bool:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(size)})])
        (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": None})])
        return [value for _, value, *_ in answer.resources[0][4]] == [str(size)]

    try:
        await eventually(is_known, what="the broker knows the limit")
    finally:
        await admin.close()
