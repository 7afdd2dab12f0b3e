"""T5, T6 and reference C: from a commit to the consumer, at fixed arrival times.

The measuring side is a process of its own (see apart), the same one for both: it commits a row on the next free connection
and receives the record. What differs is what brings it there: `orderflow run --role publisher`, or an aiokafka producer in
that very process, called right after the commit, which would lose the event if the process died in between.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from orderflow.bench import database
from orderflow.bench.apart import on_end_of_input, serve
from orderflow.bench.arrivals import arrive
from orderflow.bench.histogram import Histogram
from orderflow.engine.ids import new_id
from orderflow.engine.kafka import Kafka, bounded

OUTBOX: Final = "outbox"
PRODUCER: Final = "producer"
EVENT_TYPE = "Measured"
PATIENCE = 20.0
STOP_TIMEOUT = 5.0

INSERT = {
    OUTBOX: "INSERT INTO outbox (event_id, event_type, aggregate_id, payload) VALUES ($1, $2, $3, $4)",
    PRODUCER: "INSERT INTO plain (event_id, event_type, aggregate_id, payload) VALUES ($1, $2, $3, $4)",
}
PLAIN_TABLE = "CREATE TABLE plain (event_id uuid PRIMARY KEY, event_type text, aggregate_id uuid, payload jsonb)"


@dataclass(frozen=True, slots=True)
class Options:
    """`rate` events a second for `seconds` seconds, committed over `connections` connections; `through` OUTBOX or PRODUCER."""

    database_url: str
    bootstrap: str
    topic: str
    embedded_broker: bool
    through: str
    rate: float
    connections: int
    seconds: float
    warm_up: float


@dataclass(frozen=True, slots=True)
class Delivered:
    """What came of it; the three histograms as JSON: commit returned to received, due to received, due to commit returned."""

    sent: int
    received: int
    repeated: int
    from_commit: dict[str, Any]
    from_due: dict[str, Any]
    to_commit: dict[str, Any]


@dataclass(slots=True)
class _Event:
    due: float
    measured: bool
    committed: float = 0.0
    received: float = 0.0


class Delivery:
    """Events by their key, which is the record's key too."""

    def __init__(self, options: Options, producer: AIOKafkaProducer | None) -> None:
        self._options = options
        self._producer = producer
        self._events: dict[bytes, _Event] = {}
        self._free: asyncio.LifoQueue[asyncpg.Connection] = asyncio.LifoQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._left = 0
        self._all_received = asyncio.Event()
        self._repeated = 0
        self._error: BaseException | None = None
        self._stopping = False

    async def run(self, connections: list[asyncpg.Connection], consumer: AIOKafkaConsumer) -> Delivered:
        """Warm up, measure, and wait for what is under way. Raises asyncpg and aiokafka errors."""
        options = self._options
        on_end_of_input(self._stop)
        for connection in connections:
            self._free.put_nowait(connection)
        receiving = asyncio.create_task(self._receive(consumer))
        try:
            for measured, seconds in ((False, options.warm_up), (True, options.seconds)):
                await arrive(options.rate, seconds, lambda due, measured=measured: self._arrived(due, measured))  # type: ignore[misc]
                await asyncio.gather(*self._tasks)
                if self._error is not None:
                    raise self._error
                await self._until_received(receiving)
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
        return self._result()

    async def _until_received(self, receiving: asyncio.Task[None]) -> None:
        if self._left == 0:
            return
        self._all_received.clear()
        waiting = asyncio.create_task(self._all_received.wait())
        await asyncio.wait({waiting, receiving}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if receiving.done():
            receiving.result()

    def _stop(self) -> None:
        self._stopping = True

    def _arrived(self, due: float, measured: bool) -> None:
        if self._stopping:
            return
        task = asyncio.get_running_loop().create_task(self._write(due, measured))
        self._tasks.add(task)
        task.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._error = self._error or task.exception()

    async def _write(self, due: float, measured: bool) -> None:
        event_id, key = new_id(), new_id()
        payload = orjson.dumps({"orderId": str(key), "userId": str(event_id), "amount": "299.99"}).decode()
        name = str(key).encode()
        event = self._events[name] = _Event(due, measured)
        self._left += 1
        connection = await self._free.get()
        try:
            await connection.execute(INSERT[self._options.through], event_id, EVENT_TYPE, key, payload)
            event.committed = time.monotonic()
        finally:
            self._free.put_nowait(connection)
        if self._producer is not None:
            await (await self._producer.send(self._options.topic, **_record(event_id, key, payload)))

    async def _receive(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            batches = await consumer.getmany(timeout_ms=1000)
            now = time.monotonic()
            for record in (record for records in batches.values() for record in records):
                event = self._events.get(record.key)
                if event is None:
                    continue
                if event.received:
                    self._repeated += 1
                    continue
                event.received = now
                self._left -= 1
            if self._left == 0:
                self._all_received.set()

    def _result(self) -> Delivered:
        from_commit, from_due, to_commit = Histogram(), Histogram(), Histogram()
        measured = [event for event in self._events.values() if event.measured]
        received = [event for event in measured if event.received]
        for event in received:
            # The record can be here before we have read that its row is committed.
            from_commit.record(max(0.0, event.received - event.committed))
            from_due.record(event.received - event.due)
            to_commit.record(event.committed - event.due)
        return Delivered(
            len(measured), len(received), self._repeated, from_commit.as_json(), from_due.as_json(), to_commit.as_json()
        )


def _record(event_id: UUID, key: UUID, payload: str) -> dict[str, Any]:
    """Key, value and headers as orderflow's own records have them."""
    value = {
        "eventId": str(event_id), "eventType": EVENT_TYPE, "aggregateId": str(key), "aggregateType": "order",
        "payload": orjson.Fragment(payload),
    }  # fmt: skip
    headers = [("event-id", str(event_id).encode()), ("event-type", EVENT_TYPE.encode()), ("attempt", b"1")]
    return {"key": str(key).encode(), "value": orjson.dumps(value), "headers": headers}


async def run(options: Options) -> Delivered:
    """Everything from connecting to disconnecting. Raises OSError or TimeoutError when a server does not answer."""
    topic, address = options.topic, options.bootstrap
    await Kafka(address, topic=topic, embedded=options.embedded_broker).ensure_topic()
    async with AsyncExitStack() as stack:
        producer = None
        if options.through == PRODUCER:
            producer = AIOKafkaProducer(bootstrap_servers=address, acks="all", enable_idempotence=True)
            stack.push_async_callback(lambda: bounded(producer.stop(), STOP_TIMEOUT))
            await producer.start()
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=address, fetch_max_wait_ms=5 if options.embedded_broker else 500)
        stack.push_async_callback(lambda: bounded(consumer.stop(), STOP_TIMEOUT))
        await consumer.start()
        await consumer.seek_to_end()
        connections = [await database.connected(options.database_url) for _ in range(options.connections)]
        for connection in connections:
            stack.push_async_callback(connection.close, timeout=STOP_TIMEOUT)
        return await Delivery(options, producer).run(connections, consumer)


def main() -> int:
    return serve(Options, run)


if __name__ == "__main__":
    sys.exit(main())
