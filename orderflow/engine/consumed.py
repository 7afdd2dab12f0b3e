"""How far the group of the workers has consumed, as a time: what was published before it has been delivered, or is lost.

What still waits in Kafka is not lost. To publish it again would only lengthen the queue, and the longer the queue, the more
would be published again.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from orderflow.engine.kafka import Kafka, bounded, uncancelled
from orderflow.engine.metadata import making_no_topic
from orderflow.engine.seams import seam


@seam
async def consumed_until(kafka: Kafka) -> datetime:
    """The time of the oldest record of the topic that the group has not finished; now, where there is none.

    Raises DependencyUnavailable when Kafka does not answer.
    """
    now = datetime.now(UTC)
    partitions = await kafka.ensure_topic()
    consumer = AIOKafkaConsumer(
        **kafka.options(), group_id=kafka.group, client_id="orderflow-janitor", enable_auto_commit=False,
        auto_offset_reset="earliest", max_partition_fetch_bytes=1024,
    )  # fmt: skip
    try:
        async with asyncio.timeout(kafka.timeout):
            with making_no_topic():
                await uncancelled(consumer.start())
            times = await _first_unfinished(consumer, [TopicPartition(kafka.topic, at) for at in range(partitions)])
    except (KafkaError, TimeoutError, OSError) as error:
        raise kafka.unavailable(error) from error
    finally:
        await bounded(consumer.stop(), 2.0)
    return min([now, *times])


async def _first_unfinished(consumer: AIOKafkaConsumer, partitions: list[TopicPartition]) -> list[datetime]:
    # Assigned by hand, a member of no group: it begins where the group would, and moves nobody's partitions.
    consumer.assign(partitions)
    ends = await consumer.end_offsets(partitions)
    waiting = []
    for partition in partitions:
        position = await consumer.position(partition)
        if position > ends[partition]:
            # The topic was made anew, and the group's offsets are those of the old one: it will begin again, as we do here.
            await consumer.seek_to_beginning(partition)
            position = await consumer.position(partition)
        if position < ends[partition]:
            waiting.append(partition)
    return [datetime.fromtimestamp((await consumer.getone(partition)).timestamp / 1000, UTC) for partition in waiting]
