"""Faults of what Kafka delivers: records again, late, backwards, to two partitions at once, foreign, poisoned, too large."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from uuid import uuid4

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from orderflow.engine.kafka import bounded
from orderflow.engine.message import Message
from orderflow.torture.grounds import Action, Grounds
from orderflow.torture.plan import Fault, Kind

COUNT = 200
POISONED = 10_000
TOO_LARGE = 2_000_000
SEND_TIMEOUT = 30.0
# A Kafka that another fault has stopped is waited for.
ATTEMPTS = 6

_COLUMNS = "event_id, event_type, aggregate_type, aggregate_id, payload::text AS payload, created_at, attempt"
_NEWEST = f"SELECT {_COLUMNS} FROM outbox WHERE published_at IS NOT NULL ORDER BY created_at DESC LIMIT $1"
_OLDEST = f"SELECT {_COLUMNS} FROM outbox WHERE published_at IS NOT NULL ORDER BY created_at LIMIT $1"
_INSERT = """
INSERT INTO outbox (event_type, aggregate_type, aggregate_id, payload)
VALUES ('Oversized', 'torture', $1, jsonb_build_object('text', repeat('x', $2))) RETURNING event_id
"""

Record = tuple[bytes | None, bytes, list[tuple[str, bytes]]]


class RecordFaults:
    """`actions`: by kind."""

    def __init__(self, grounds: Grounds) -> None:
        self._grounds = grounds
        self.actions: Mapping[Kind, Action] = {
            Kind.RECORDS_AGAIN: self._again,
            Kind.RECORDS_LATE: self._late,
            Kind.RECORDS_REORDERED: self._reordered,
            Kind.RECORDS_AT_ONCE: self._at_once,
            Kind.RECORDS_FOREIGN: self._foreign,
            Kind.RECORDS_POISONED: self._poisoned,
            Kind.EVENT_TOO_LARGE: self._too_large,
        }

    async def _again(self, fault: Fault) -> str:
        return await self._send([(record, None) for record in await self._records(_NEWEST)])

    async def _late(self, fault: Fault) -> str:
        return await self._send([(record, None) for record in await self._records(_OLDEST)])

    async def _reordered(self, fault: Fault) -> str:
        return await self._send([(record, fault.pick + at) for at, record in enumerate(await self._records(_NEWEST))])

    async def _at_once(self, fault: Fault) -> str:
        return await self._send([(record, fault.pick + at) for record in await self._records(_NEWEST) for at in range(2)])

    async def _foreign(self, fault: Fault) -> str:
        chance = random.Random(fault.pick)
        found: list[tuple[Record, int | None]] = []
        for _ in range(COUNT):
            order_id = str(uuid4())
            value = {
                "eventId": str(uuid4()), "eventType": chance.choice(("OrderCreated", "OrderPaid", "Elsewhere")),
                "aggregateId": order_id, "aggregateType": "order", "createdAt": "2026-01-01T00:00:00+00:00",
                "payload": {"orderId": order_id, "userId": order_id, "amount": "1.00"},
            }  # fmt: skip
            found.append(((order_id.encode(), json.dumps(value).encode(), []), None))
        return await self._send(found)

    async def _poisoned(self, fault: Fault) -> str:
        chance = random.Random(fault.pick)
        return await self._send([((None, chance.randbytes(chance.randint(0, 200)), []), fault.pick) for _ in range(POISONED)])

    async def _too_large(self, fault: Fault) -> str:
        return f"event {await self._grounds.ask(_INSERT, uuid4(), TOO_LARGE)}"

    async def _records(self, statement: str) -> list[Record]:
        rows = await self._grounds.fetch(statement, COUNT)
        return [
            Message(
                row["event_id"], row["event_type"], row["aggregate_type"], row["aggregate_id"], row["payload"],
                row["created_at"], row["attempt"],
            ).encode()
            for row in rows
        ]  # fmt: skip

    async def _send(self, records: list[tuple[Record, int | None]]) -> str:
        """Each to the partition that its key has, or to that one modulo their number."""
        for attempt in range(ATTEMPTS):
            try:
                async with asyncio.timeout(SEND_TIMEOUT), self._producer() as producer:
                    # None for a moment after the topic was deleted.
                    partitions = sorted(await producer.partitions_for(self._grounds.topic)) or [0]
                    sent = [
                        await producer.send(
                            self._grounds.topic, value, key=key, headers=headers,
                            partition=None if at is None else partitions[at % len(partitions)],
                        )
                        for (key, value, headers), at in records
                    ]  # fmt: skip
                    await asyncio.gather(*sent)
                break
            except (KafkaError, TimeoutError, OSError):
                if attempt == ATTEMPTS - 1:
                    return "Kafka took none"
        return f"{len(records):,} records"

    @asynccontextmanager
    async def _producer(self) -> AsyncIterator[AIOKafkaProducer]:
        producer = AIOKafkaProducer(bootstrap_servers=self._grounds.bootstrap, linger_ms=5)
        try:
            await producer.start()
            yield producer
        finally:
            await bounded(producer.stop(), 5.0)
