"""The consumer: fetch -> run by key -> commit the contiguous watermark; backpressure and rebalances.

Nothing is committed but what is settled. A partition that is taken away is drained for a moment; what does not end in time is
delivered again to its next owner, and processed_events decides between the two.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import ConsumerRecord

from orderflow.engine.kafka import Kafka, bounded, uncancelled
from orderflow.engine.patience import within
from orderflow.engine.scheduler import KeyScheduler
from orderflow.engine.seams import owning_seam, seam
from orderflow.engine.telemetry import WORKER, emit
from orderflow.engine.watermark import Watermark

R = TypeVar("R")
# Seconds for what is known without asking anybody.
AT_ONCE = 0.05
# What is finished behind a slow delivery waits as a bare number: of those a partition may hold so many times its equal share.
HELD = 8
Item = tuple[TopicPartition, Watermark, ConsumerRecord]
# Begins a record's way, and is told its end: None, or the error that leaves it unsettled.
Start = Callable[[ConsumerRecord, Callable[[BaseException | None], None]], None]


class Consumer(ConsumerRebalanceListener):  # type: ignore[misc]
    """Feeds records of the topic to `start`, in order within a key and concurrently across keys.

    A partition may have as many deliveries in flight as are still free of `max_in_flight`, and half an equal share at any time:
    together they come near it, one whose keys are slow gets no more than half of it, and none waits for another's room (the
    dynamic threshold of Choudhury and Hahne, 1998). Of offsets that are finished behind a slow one it may hold HELD times an
    equal share. `delivery_limit` is what a delivery may take. Times in seconds.
    """

    def __init__(
        self, kafka: Kafka, start: Start, *, client_id: str, max_in_flight: int = 5000,
        commit_interval: float = 0.5, drain_timeout: float = 8.0, rebalance_timeout: float = 3.0, delivery_limit: float = 15.0,
        started: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._kafka = kafka
        self._start = start
        self._client_id = client_id
        self._max_in_flight = max_in_flight
        self._commit_interval = commit_interval
        self._drain_timeout = drain_timeout
        self._rebalance_timeout = rebalance_timeout
        self._delivery_limit = delivery_limit
        self._started = started
        self._scheduler: KeyScheduler[Item] = KeyScheduler(self._start_item)
        self._watermarks: dict[TopicPartition, Watermark] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._paused: set[TopicPartition] = set()
        self._in_flight = 0
        # Of max_in_flight, what would be each partition's.
        self._share = max_in_flight
        self._consumer: AIOKafkaConsumer | None = None
        self._failure: BaseException | None = None
        self._failed = asyncio.Event()
        # The progress that `due` has seen last, and since when.
        self._seen: object = None
        self._seen_at = 0.0

    async def run(self, stopping: asyncio.Event) -> None:
        """Consume until `stopping` is set, then drain.

        Raises DependencyUnavailable when Kafka is lost, and the error of a record that could not be settled.
        """
        interrupt = asyncio.create_task(_first(stopping, self._failed))
        try:
            consumer = await _unless(interrupt, self._join())
            if consumer is not None:
                await self._consume(consumer, stopping, interrupt)
        except KafkaError as error:
            raise self._kafka.unavailable(error) from error
        finally:
            interrupt.cancel()
            await asyncio.gather(interrupt, return_exceptions=True)

    @owning_seam
    async def _join(self) -> AIOKafkaConsumer:
        await self._kafka.ensure_topic()
        return await self._kafka.consumer(self, client_id=self._client_id)

    async def _consume(self, consumer: AIOKafkaConsumer, stopping: asyncio.Event, interrupt: asyncio.Task[None]) -> None:
        self._consumer = consumer
        self._started()
        committer = asyncio.create_task(self._commit_now_and_then(consumer))
        try:
            while not stopping.is_set() and self._failure is None:
                fetched = await _unless(interrupt, self._fetch(consumer))
                for partition, records in (fetched or {}).items():
                    self._take(consumer, partition, records)
                if committer.done():
                    committer.result()
            if self._failure is not None:
                raise self._failure
            await self._scheduler.drain(self._drain_timeout)
        finally:
            committer.cancel()
            await asyncio.gather(committer, return_exceptions=True)
            self._scheduler.forget_all()
            await bounded(self._commit(consumer), 2.0)
            await bounded(consumer.stop(), 3.0)

    @seam
    async def _fetch(self, consumer: AIOKafkaConsumer) -> dict[TopicPartition, list[ConsumerRecord]]:
        fetched: dict[TopicPartition, list[ConsumerRecord]] = await consumer.getmany(timeout_ms=500, max_records=1000)
        return fetched

    def progress(self) -> object:
        """Differs once a record has been taken or finished, or a partition come or gone."""
        return {partition: (mark.position, mark.held, mark.in_flight) for partition, mark in self._watermarks.items()}

    @seam
    async def due(self, refuse_unless_able: Callable[[], Awaitable[None]]) -> str | None:
        """What should be going on while nothing is: deliveries that have had their time, or records that nobody fetches.

        Raises a transient error when Kafka cannot be asked; `refuse_unless_able` raises one while no delivery can be settled.
        """
        consumer, now, progress = self._consumer, time.monotonic(), self.progress()
        if self._seen != progress:
            self._seen, self._seen_at = progress, now
        if consumer is None:
            return None
        if in_flight := sum(watermark.in_flight for watermark in self._watermarks.values()):
            if now - self._seen_at < self._delivery_limit:
                return None
            await refuse_unless_able()
            return f"{in_flight} deliveries are in flight"
        try:
            places = [partition for partition in self._watermarks if partition not in self._paused]
            ends = await within(consumer.end_offsets(places), self._kafka.timeout) if places else {}
            lag = sum([max(0, end - await self._position(consumer, partition)) for partition, end in ends.items()])
        except KafkaError as error:
            raise self._kafka.unavailable(error) from error
        return f"{lag} records wait in {len(places)} partitions" if lag else None

    @seam
    async def _position(self, consumer: AIOKafkaConsumer, partition: TopicPartition) -> int:
        try:
            known: int = await within(consumer.position(partition), AT_ONCE)
            return known
        except TimeoutError:
            # Not found out yet, and whoever does that may be what stands still.
            committed: int | None = await within(consumer.committed(partition), self._kafka.timeout)
            if committed is None:
                committed = (await within(consumer.beginning_offsets([partition]), self._kafka.timeout))[partition]
            return committed

    def _take(self, consumer: AIOKafkaConsumer, partition: TopicPartition, records: Iterable[ConsumerRecord]) -> None:
        watermark = self._watermarks.get(partition)
        if watermark is None:
            return
        for record in records:
            if watermark.take(record.offset):
                self._in_flight += 1
                # No key, as no event of ours: one after the other, ten thousand poisoned records would stop their partition.
                self._scheduler.submit(record.key or (partition, record.offset), (partition, watermark, record))
        self._pause_or_resume(consumer, partition, watermark)

    def _start_item(self, key: Hashable, item: Item) -> None:
        partition, watermark, record = item

        def finished(error: BaseException | None) -> None:
            if error is not None:
                # Its key stays at work: what is behind it must not overtake it.
                self._failure = self._failure or error
                self._failed.set()
                return
            watermark.finish(record.offset)
            # Not for a watermark of before a rebalance: the partition may be another's now.
            if self._watermarks.get(partition) is watermark:
                self._in_flight -= 1
                if partition in self._paused and self._consumer is not None:
                    self._pause_or_resume(self._consumer, partition, watermark)
            self._scheduler.finished(key)

        self._start(record, finished)

    def _pause_or_resume(self, consumer: AIOKafkaConsumer, partition: TopicPartition, watermark: Watermark) -> None:
        room = min(max(self._max_in_flight - self._in_flight, self._share // 2, 1), HELD * self._share - watermark.held)
        if watermark.in_flight >= room:
            if partition not in self._paused:
                consumer.pause(partition)
                self._paused.add(partition)
        elif partition in self._paused and watermark.in_flight <= room * 3 // 4:
            self._paused.discard(partition)
            consumer.resume(partition)

    async def _commit_now_and_then(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            await asyncio.sleep(self._commit_interval)
            await self._commit(consumer)

    @seam
    async def _commit(self, consumer: AIOKafkaConsumer) -> None:
        offsets = {
            partition: watermark.position
            for partition, watermark in self._watermarks.items()
            if watermark.position is not None and self._committed.get(partition) != watermark.position
        }
        if not offsets:
            return
        try:
            await within(uncancelled(consumer.commit(offsets)), self._kafka.timeout)
            self._committed.update(offsets)
        except (CommitFailedError, IllegalStateError):
            # Routine in a rebalance: the partition has another owner, to whom the records are delivered again.
            emit(WORKER, "COMMIT_REFUSED", partitions=len(offsets))

    @seam
    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Let what runs end, for a bounded time; commit; forget the rest, which the next owner gets again."""
        gone = set(revoked)
        if not gone:
            return
        self._scheduler.forget_waiting(lambda item: item[0] in gone)
        await self._scheduler.drain(self._rebalance_timeout)
        if self._consumer is not None:
            try:
                await self._commit(self._consumer)
            except (KafkaError, TimeoutError):
                emit(WORKER, "COMMIT_REFUSED", partitions=len(gone))
        for partition in gone:
            self._watermarks.pop(partition, None)
            self._committed.pop(partition, None)
            self._paused.discard(partition)
        self._in_flight = sum(watermark.in_flight for watermark in self._watermarks.values())

    @seam
    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Begin each partition with a fresh watermark."""
        partitions = sorted(p.partition for p in assigned)
        self._share = max(1, self._max_in_flight // max(1, len(partitions)))
        for partition in assigned:
            self._watermarks[partition] = Watermark()
        emit(WORKER, "ASSIGNED", partitions=partitions)


async def _unless(interrupt: asyncio.Task[None], work: Coroutine[Any, Any, R]) -> R | None:
    """The result of `work`, or None when `interrupt` ends before it: then the work is cancelled, and its end awaited."""
    task = asyncio.create_task(uncancelled(work))
    try:
        await asyncio.wait((task, interrupt), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
