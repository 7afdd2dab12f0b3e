"""One round's events into Kafka: grouped by partition, sent in order, each with what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError, UnknownTopicOrPartitionError
from aiokafka.producer.message_accumulator import BatchBuilder

from orderflow.engine.kafka import MAX_RECORD_BYTES, Kafka, stop_producer
from orderflow.engine.message import OUR_HEADERS, Message
from orderflow.engine.partition import partition_of
from orderflow.engine.patience import DependencyUnavailable
from orderflow.engine.seams import seam
from orderflow.engine.telemetry import PUBLISHER, emit

# Errors of one record, whatever else the cluster can do: sending it again cannot help.
UNPUBLISHABLE = (MessageSizeTooLargeError, UnicodeEncodeError)

# What a broker says of a batch above the topic's limit, and of one above the size of a segment.
_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)

# What a record weighs besides its key, value and headers, at the most.
_OVERHEAD_BYTES = 100

# How often a round that waits looks whether there still is a topic.
LOOK_SECONDS = 0.5

# An aggregate has several events, close to each other in time.
_partition_of = lru_cache(maxsize=8192)(partition_of)


class _Batch:
    """Events for one partition that share a request, a future and a fate; `places` are their indices in the round."""

    def __init__(self, partition: int, builder: BatchBuilder) -> None:
        self.partition = partition
        self.builder = builder
        self.places: list[int] = []


class Publishing:
    """Sends rounds of events with one producer; the caller makes a new one when a round says that it is stuck."""

    def __init__(self, kafka: Kafka, producer: AIOKafkaProducer) -> None:
        self._kafka = kafka
        self._producer = producer

    @seam
    async def send(self, due: Sequence[Message]) -> tuple[list[BaseException | None], bool]:
        """Send in order; for each event None when Kafka acknowledged it, else the error. True: the producer is stuck.

        A future for each batch and not for each event, as aiokafka's batch interface allows.
        """
        results: list[BaseException | None] = [TimeoutError("no acknowledgement in time")] * len(due)
        sent: list[tuple[asyncio.Future[object], list[int]]] = []
        before: dict[int, asyncio.Future[object]] = {}
        try:
            async with asyncio.timeout(self._kafka.timeout):
                partitions = len(await self._producer.partitions_for(self._kafka.topic))
                for batch in self._batches(due, partitions, results):
                    # A broker takes any sequence number as the first of a producer: behind a refused batch it would take
                    # the next one, and the events of an aggregate would be out of order.
                    if batch.partition in before and await _failed(before[batch.partition]):
                        continue
                    batch.builder.close()
                    future = await self._producer.send_batch(batch.builder, self._kafka.topic, partition=batch.partition)
                    before[batch.partition] = future
                    sent.append((future, batch.places))
                await self._until_done({future for future, _ in sent})
        except (KafkaError, TimeoutError) as error:
            # Bounded: what was acknowledged before the limit counts, the rest keeps its error.
            emit(PUBLISHER, "PUBLISH_INTERRUPTED", error=str(error) or type(error).__name__)
        refused = _take_results(sent, results)
        if refused:
            await self._find_guilty(due, refused, results)
        return results, bool(refused)

    async def _until_done(self, waiting: set[asyncio.Future[object]]) -> None:
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=LOOK_SECONDS)
            # Nobody makes it anew but the role's next start: to wait for the rest of the time would help nobody.
            if waiting and self._producer.client.cluster.partitions_for_topic(self._kafka.topic) is None:
                raise UnknownTopicOrPartitionError(f"topic {self._kafka.topic} has vanished")

    def _batches(self, due: Sequence[Message], partitions: int, results: list[BaseException | None]) -> list[_Batch]:
        """The events as records, in batches; those of one partition are in the order of the round."""
        batches: list[_Batch] = []
        last: dict[int, _Batch] = {}
        for place, message in enumerate(due):
            try:
                key, value, headers = message.encode()
                _refuse_too_large(key, value, headers)
                partition = _partition_of(key, partitions)
                batch = last.get(partition)
                if batch is None or batch.builder.append(timestamp=None, key=key, value=value, headers=headers) is None:
                    batch = last[partition] = _Batch(partition, self._producer.create_batch())
                    batches.append(batch)
                    batch.builder.append(timestamp=None, key=key, value=value, headers=headers)
                batch.places.append(place)
            except UNPUBLISHABLE as error:
                results[place] = error
        return [batch for batch in batches if batch.places]

    @seam
    async def _find_guilty(self, due: Sequence[Message], refused: Sequence[int], results: list[BaseException | None]) -> None:
        """The broker refuses a batch for its size: its events are sent alone, in order, and what is refused then is guilty.

        Those for which the time does not suffice keep their error. A refused batch leaves a gap in its producer's sequence
        numbers: this is done with producers of its own, and the role starts again with a fresh one.
        """
        left = list(refused)
        try:
            async with asyncio.timeout(self._kafka.timeout):
                while left:
                    await self._send_alone(due, left, results)
        except (KafkaError, TimeoutError, DependencyUnavailable) as error:
            emit(PUBLISHER, "PUBLISH_INTERRUPTED", error=str(error) or type(error).__name__)

    @seam
    async def _send_alone(self, due: Sequence[Message], left: list[int], results: list[BaseException | None]) -> None:
        """Take from `left` as far as to the first that is refused."""
        producer = await self._kafka.producer()
        try:
            while left:
                key, value, headers = due[left[0]].encode()
                try:
                    await producer.send_and_wait(self._kafka.topic, value, key, headers=headers)
                    results[left.pop(0)] = None
                except _TOO_LARGE:
                    results[left.pop(0)] = MessageSizeTooLargeError(
                        f"the record has about {_size_of(key, value, headers)} bytes, and the broker refuses it: raise the "
                        "topic's max.message.bytes, then redrive"
                    )
                    return
        finally:
            await stop_producer(producer)


async def _failed(future: asyncio.Future[object]) -> bool:
    await asyncio.wait([future])
    return future.cancelled() or future.exception() is not None


def _refuse_too_large(key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]]) -> None:
    # The batch interface leaves out the check that `send` makes: the broker would refuse the whole batch.
    if len(value) < MAX_RECORD_BYTES // 4 and len(headers) == len(OUR_HEADERS):
        return
    size = _size_of(key, value, headers)
    if size > MAX_RECORD_BYTES:
        raise MessageSizeTooLargeError(f"the record has {size} bytes, and the limit is {MAX_RECORD_BYTES}")


def _size_of(key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]]) -> int:
    return _OVERHEAD_BYTES + len(key) + len(value) + sum(len(name) + len(text) + 10 for name, text in headers)


def _take_results(sent: Sequence[tuple[asyncio.Future[object], list[int]]], results: list[BaseException | None]) -> list[int]:
    """Note each batch's outcome for its events; returns the places of those that the broker found too large."""
    refused: list[int] = []
    for future, places in sent:
        if not future.done() or future.cancelled():
            # It ends later, with nobody to ask for its error any more.
            future.add_done_callback(_take_error)
            continue
        error = future.exception()
        if isinstance(error, _TOO_LARGE):
            refused.extend(places)
        else:
            for place in places:
                results[place] = error
    return sorted(refused)


def _take_error(future: asyncio.Future[object]) -> None:
    if not future.cancelled():
        future.exception()
