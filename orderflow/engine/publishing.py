"""One round's events into Kafka: grouped by partition, sent in order, each with what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from aiokafka.producer.message_accumulator import BatchBuilder

from orderflow.engine.kafka import MAX_RECORD_BYTES, Kafka, bounded
from orderflow.engine.message import OUR_HEADERS, Message
from orderflow.engine.partition import partition_of
from orderflow.engine.telemetry import PUBLISHER, emit

# Errors of one record, whatever else the cluster can do: sending it again cannot help.
UNPUBLISHABLE = (MessageSizeTooLargeError, UnicodeEncodeError)

# What a record weighs besides its key, value and headers, at the most.
_OVERHEAD_BYTES = 100

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

    async def send(self, due: Sequence[Message]) -> tuple[list[BaseException | None], bool]:
        """Send in order; for each event None when Kafka acknowledged it, else the error. True: the producer is stuck.

        A future for each batch and not for each event, as aiokafka's batch interface allows.
        """
        results: list[BaseException | None] = [TimeoutError("no acknowledgement in time")] * len(due)
        sent: list[tuple[asyncio.Future[object], list[int]]] = []
        try:
            async with asyncio.timeout(self._kafka.timeout):
                partitions = len(await self._producer.partitions_for(self._kafka.topic))
                for batch in self._batches(due, partitions, results):
                    batch.builder.close()
                    future = await self._producer.send_batch(batch.builder, self._kafka.topic, partition=batch.partition)
                    sent.append((future, batch.places))
                if sent:
                    await asyncio.wait([future for future, _ in sent])
        except (KafkaError, TimeoutError) as error:
            # Bounded: what was acknowledged before the limit counts, the rest keeps its error.
            emit(PUBLISHER, "PUBLISH_INTERRUPTED", error=str(error) or type(error).__name__)
        refused = _take_results(sent, results)
        if refused:
            await self._find_guilty(due, refused, results)
        return results, bool(refused)

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

    async def _find_guilty(self, due: Sequence[Message], refused: Sequence[int], results: list[BaseException | None]) -> None:
        """The broker refuses a whole batch for one record: sent alone, and in order, the first that is refused is guilty.

        The others keep their error. A refused batch leaves a gap in its producer's sequence numbers, and the broker takes
        nothing after it: this is done with a producer of its own, and the role starts again with a fresh one.
        """
        producer = await self._kafka.producer()
        try:
            async with asyncio.timeout(self._kafka.timeout):
                for place in refused:
                    key, value, headers = due[place].encode()
                    try:
                        await producer.send_and_wait(self._kafka.topic, value, key, headers=headers)
                        results[place] = None
                    except MessageSizeTooLargeError as error:
                        results[place] = error
                        return
        except (KafkaError, TimeoutError) as error:
            emit(PUBLISHER, "PUBLISH_INTERRUPTED", error=str(error) or type(error).__name__)
        finally:
            await bounded(producer.stop(), 2.0)


def _refuse_too_large(key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]]) -> None:
    # The batch interface leaves out the check that `send` makes: the broker would refuse the whole batch.
    if len(value) < MAX_RECORD_BYTES // 4 and len(headers) == len(OUR_HEADERS):
        return
    size = _OVERHEAD_BYTES + len(key) + len(value) + sum(len(name) + len(text) + 10 for name, text in headers)
    if size > MAX_RECORD_BYTES:
        raise MessageSizeTooLargeError(f"the record has {size} bytes, and the limit is {MAX_RECORD_BYTES}")


def _take_results(sent: Sequence[tuple[asyncio.Future[object], list[int]]], results: list[BaseException | None]) -> list[int]:
    """Note each batch's outcome for its events; returns the places of those that the broker found too large."""
    refused: list[int] = []
    for future, places in sent:
        if not future.done() or future.cancelled():
            # It ends later, with nobody to ask for its error any more.
            future.add_done_callback(_take_error)
            continue
        error = future.exception()
        if isinstance(error, MessageSizeTooLargeError):
            refused.extend(places)
        else:
            for place in places:
                results[place] = error
    return sorted(refused)


def _take_error(future: asyncio.Future[object]) -> None:
    if not future.cancelled():
        future.exception()
