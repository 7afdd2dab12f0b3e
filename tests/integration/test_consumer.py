"""The consumer against real Kafka: order within a key, concurrency across keys, commits, backpressure, rebalances, poison."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import orjson
import pytest
from aiokafka import AIOKafkaProducer

from orderflow.engine.circuit import Circuit
from orderflow.engine.consumer import Consumer
from orderflow.engine.handling import Record
from orderflow.payments.handlers import ChargeHandler
from tests.pipeline import Facts, FakeGateway, in_tasks, kafka_for, opened, running, watching, worker_with
from tests.rows import insert_event, message_of, place, states
from tests.servers import Broker
from tests.topics import committed_offsets, producing
from tests.waiting import eventually


class Part:
    """A consumer as a service, whose deliveries are noted and may be held up."""

    name = "consumer"

    def __init__(self, broker: Broker, topic: str, **options: Any) -> None:
        self.begun: list[Record] = []
        self.ended: list[Record] = []
        self.until: Callable[[Record], Any] = lambda record: None
        self.consumer = Consumer(
            kafka_for(broker, topic),
            in_tasks(self._execute),
            client_id="c",
            **{"commit_interval": 0.05, "drain_timeout": 5.0, **options},
        )

    async def run(self, stopping: asyncio.Event) -> None:
        await self.consumer.run(stopping)

    async def _execute(self, record: Record) -> None:
        self.begun.append(record)
        held = self.until(record)
        if held is not None:
            await held
        self.ended.append(record)

    async def has_begun(self, count: int) -> None:
        await eventually(lambda: len(self.begun) >= count, 30, what=f"{count} deliveries have begun")

    async def has_ended(self, count: int) -> None:
        await eventually(lambda: len(self.ended) >= count, 30, what=f"{count} deliveries have ended")


@asynccontextmanager
async def consuming(broker: Broker, topic: str, **options: Any) -> AsyncIterator[Part]:
    part = Part(broker, topic, **options)
    async with running(part):
        yield part


async def produce(broker: Broker, topic: str, records: list[tuple[bytes | None, bytes]], partition: int | None = 0) -> None:
    async with producing(broker) as producer:
        sent = [await producer.send(topic, value, key, partition=partition) for key, value in records]
        await asyncio.gather(*sent)


async def has_committed(broker: Broker, topic: str, wanted: dict[int, int]) -> None:
    async def reached() -> bool:
        found = await committed_offsets(broker, topic)
        assert found == wanted
        return True

    await eventually(reached, 20)


def keys(records: list[Record]) -> list[bytes | None]:
    return [record.key for record in records]


async def test_order_within_a_key_and_no_waiting_for_other_keys(kafka: Broker, topic: str) -> None:
    # All in one partition: key a holds up nobody but itself.
    gate = asyncio.Event()
    await produce(kafka, topic, [(b"a", b"0"), (b"a", b"1"), *[(b"b%d" % (n % 7), b"%d" % n) for n in range(70)], (b"a", b"2")])
    part = Part(kafka, topic)
    part.until = lambda record: gate.wait() if record.key == b"a" else None
    async with running(part):
        await part.has_ended(70)
        assert [record.value for record in part.begun if record.key == b"a"] == [b"0"]
        by_key: dict[bytes | None, list[int]] = defaultdict(list)
        for record in part.ended:
            by_key[record.key].append(int(record.value or b""))
        assert all(values == sorted(values) for values in by_key.values())
        # Nothing may be committed past the first, which is not finished; nothing at all was finished before it.
        assert await committed_offsets(kafka, topic) == {}
        gate.set()
        await part.has_ended(73)
        assert [record.value for record in part.ended if record.key == b"a"] == [b"0", b"1", b"2"]
        await has_committed(kafka, topic, {0: 73})


async def test_thousands_in_flight_in_one_partition(kafka: Broker, topic: str) -> None:
    await produce(kafka, topic, [(b"k%d" % n, b"x") for n in range(3000)])
    gate = asyncio.Event()
    part = Part(kafka, topic, max_in_flight=20_000)
    part.until = lambda record: gate.wait()
    async with running(part):
        await part.has_begun(3000)
        gate.set()
    await has_committed(kafka, topic, {0: 3000})


async def test_records_without_a_key_keep_their_partition_s_order(kafka: Broker, topic: str) -> None:
    await produce(kafka, topic, [(None, b"%d" % n) for n in range(50)])
    async with consuming(kafka, topic) as part:
        await part.has_ended(50)
    assert [int(record.value or b"") for record in part.ended] == list(range(50))


async def test_after_a_drain_what_is_committed_is_what_was_processed(kafka: Broker, topic: str) -> None:
    for partition in range(4):
        await produce(kafka, topic, [(b"k%d" % n, b"x") for n in range(10 * (partition + 1))], partition)
    async with consuming(kafka, topic, commit_interval=3600.0) as part:
        await part.has_begun(100)
    assert await committed_offsets(kafka, topic) == {0: 10, 1: 20, 2: 30, 3: 40}
    async with consuming(kafka, topic) as again:
        await produce(kafka, topic, [(b"last", b"x")])
        await again.has_ended(1)
        assert keys(again.begun) == [b"last"]


async def test_what_does_not_end_in_time_is_delivered_again(kafka: Broker, topic: str) -> None:
    await produce(kafka, topic, [(b"a", b"0"), (b"b", b"1"), (b"c", b"2")])
    part = Part(kafka, topic, drain_timeout=0.1)
    part.until = lambda record: asyncio.Event().wait() if record.key == b"b" else None
    async with running(part):
        await part.has_ended(2)
    assert await committed_offsets(kafka, topic) == {0: 1}
    async with consuming(kafka, topic) as again:
        await again.has_ended(2)
    assert keys(again.ended) == [b"b", b"c"]


async def test_an_error_of_ours_ends_the_run_and_commits_nothing_behind_it(kafka: Broker, topic: str) -> None:
    await produce(kafka, topic, [(b"a", b"0"), (b"b", b"1"), (b"c", b"2")])
    part = Part(kafka, topic, drain_timeout=0.1)

    async def fail() -> None:
        raise ZeroDivisionError("a bug")

    part.until = lambda record: fail() if record.key == b"b" else None
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await asyncio.wait_for(part.run(asyncio.Event()), 30)
    assert await committed_offsets(kafka, topic) == {0: 1}


async def test_a_full_partition_is_paused_and_the_others_are_not(kafka: Broker, topic: str) -> None:
    gate = asyncio.Event()
    part = Part(kafka, topic, max_in_flight=80)
    part.until = lambda record: gate.wait() if record.key != b"other" else None
    async with running(part):
        await produce(kafka, topic, [(b"k%d" % n, b"x") for n in range(40)], 0)
        await part.has_begun(40)
        await produce(kafka, topic, [(b"l%d" % n, b"x") for n in range(40)], 0)
        for number in range(1, 4):
            await produce(kafka, topic, [(b"other", b"x")], 1)
            await part.has_ended(number)
        # Three fetches later the full partition has been left alone.
        assert len(part.begun) == 43
        gate.set()
        await part.has_ended(83)
        await has_committed(kafka, topic, {0: 80, 1: 3})


async def test_a_partition_that_has_more_than_there_is_leaves_the_others_some_of_it(kafka: Broker, topic: str) -> None:
    gate = asyncio.Event()
    part = Part(kafka, topic, max_in_flight=16)
    part.until = lambda record: gate.wait() if record.partition == 0 else None
    async with running(part):
        await produce(kafka, topic, [(b"k%d" % n, b"x") for n in range(100)], 0)
        await part.has_begun(16)
        await produce(kafka, topic, [(b"o%d" % n, b"x") for n in range(50)], 1)
        await part.has_ended(50)
        gate.set()
        await part.has_ended(150)
        await has_committed(kafka, topic, {0: 100, 1: 50})


async def test_what_is_finished_behind_a_slow_head_holds_up_nobody_until_there_is_much_of_it(kafka: Broker, topic: str) -> None:
    gate = asyncio.Event()
    # Of four partitions: ten in flight each, and eighty offsets.
    part = Part(kafka, topic, max_in_flight=40)
    part.until = lambda record: gate.wait() if record.key == b"slow" else None
    async with running(part):
        await produce(kafka, topic, [(b"slow", b"x"), *[(b"k%d" % n, b"x") for n in range(39)]], 0)
        await part.has_ended(39)
        await produce(kafka, topic, [(b"k%d" % n, b"x") for n in range(20)], 0)
        await part.has_ended(59)
        await produce(kafka, topic, [(b"k%d" % n, b"x") for n in range(60)], 0)
        await part.has_ended(78)
        await produce(kafka, topic, [(b"late%d" % n, b"x") for n in range(5)], 0)
        for _ in range(3):
            before = len(part.ended)
            await produce(kafka, topic, [(b"other", b"x")], 1)
            await part.has_ended(before + 1)
        assert not [key for key in keys(part.begun) if key and key.startswith(b"late")]
        gate.set()
        await part.has_ended(128)
        await has_committed(kafka, topic, {0: 125, 1: 3})


async def test_a_start_is_interruptible_and_a_stop_before_anything_came_ends(kafka: Broker, topic: str) -> None:
    part = Part(kafka, topic)
    async with running(part):
        pass
    assert part.begun == []


# ------------------------------------------------------------------------------------------ with workers and PostgreSQL


async def send_events(connection: asyncpg.Connection, broker: Broker, topic: str, event_ids: list[Any]) -> None:
    """Put events into Kafka as a relay does, and note it on their rows."""
    async with producing(broker) as producer:
        sent = []
        for event_id in event_ids:
            key, value, headers = (await message_of(connection, event_id)).encode()
            sent.append(await producer.send(topic, value, key, headers=headers))
        await asyncio.gather(*sent)
    await connection.execute("UPDATE outbox SET published_at = now() WHERE event_id = ANY($1)", event_ids)


@asynccontextmanager
async def charging(url: str, gateway: FakeGateway, worker_id: str) -> AsyncIterator[dict[str, ChargeHandler]]:
    async with opened(url, size=6) as database:
        circuit = Circuit(database, "gateway", worker_id=worker_id, failures=0)
        # The gate may stay shut for longer than a charge usually may take.
        handler = ChargeHandler(database, gateway, circuit, worker_id=worker_id, timeout=60.0)
        try:
            yield {"OrderCreated": handler}
        finally:
            await handler.close()
            await circuit.close()


async def test_workers_join_and_leave_while_deliveries_are_in_flight(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    gateway = FakeGateway()
    gate = asyncio.Event()

    async def charge(request: Any) -> Any:
        if len(gateway.requests) > 20:
            await gate.wait()
        return gateway.book(request)

    gateway.on_charge = charge
    event_ids = [event_id for _, event_id in await place(connection, 400)]
    await send_events(connection, kafka, topic, event_ids[:250])
    with watching() as facts:
        async with charging(database_url, gateway, "a") as first, charging(database_url, gateway, "b") as second:
            one = worker_with(first, database_url, kafka_for(kafka, topic), worker_id="a")
            two = worker_with(second, database_url, kafka_for(kafka, topic), worker_id="b")
            async with running(two):
                await facts.until("PAYMENT_RESULT", count=20)
                async with running(one):
                    # 230 charges are under way when two of the four partitions go to the other worker, who charges them, too.
                    await eventually(lambda: shared(facts), 30, what="each has two partitions")
                    await send_events(connection, kafka, topic, event_ids[250:])
                    await facts.until("EVENT_RECEIVED", count=420)
                    gate.set()
                    await facts.until("PAYMENT_RESULT", count=150)
                await eventually(lambda: paid(connection, 400), 60)
    assert await states(connection) == {"PAID": 400}
    assert await connection.fetchval("SELECT count(*) FROM processed_events WHERE event_id = ANY($1)", event_ids) == 400
    workers = {row["worker_id"] for row in await connection.fetch("SELECT DISTINCT worker_id FROM processed_events")}
    assert workers == {"a", "b"}
    assert len(gateway.charges) == 400
    assert len(facts.of("PAYMENT_RESULT")) == 400
    assert await connection.fetchval("SELECT count(*) FROM outbox WHERE event_type = 'OrderPaid'") == 400


def shared(facts: Facts) -> bool:
    return [len(fact["partitions"]) for fact in facts.of("ASSIGNED")][-2:] == [2, 2]


async def paid(connection: asyncpg.Connection, count: int) -> bool:
    return (await states(connection)).get("PAID") == count


async def test_poison_is_buried_and_its_partition_goes_on(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    good = [await insert_event(connection) for _ in range(4)]
    encoded = [(await message_of(connection, event_id)).encode() for event_id in good]
    poison: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]] = [
        (b"k", b"not JSON", []),
        (b"", None, []),
        (b"\xff\xfe", bytes(range(256)), [("attempt", b"\xff")]),
        (b"k", b"x" * 900_000, [("note", None)]),
        (b"k", orjson.dumps({"eventId": 7}), [("", b""), ("n\0", rb"\u0000")]),
        (b"k", b"[" * 100_000, []),
    ]
    async with producing(kafka) as producer:
        for index, (key, value, headers) in enumerate(poison):
            await producer.send_and_wait(topic, value, key, partition=2, headers=headers)
            if index < len(good):
                key, value, headers = encoded[index]
                await producer.send_and_wait(topic, value, key, partition=2, headers=headers)
    worker = worker_with({}, database_url, kafka_for(kafka, topic))
    with watching() as facts:
        async with running(worker):
            await facts.until("EVENT_PROCESSED", count=4)
            await facts.until("DLQ_EVENT", count=6)
    assert await committed_offsets(kafka, topic) == {2: 10}
    letters = await connection.fetch('SELECT topic, partition, "offset", raw FROM dead_letter_events ORDER BY "offset"')
    assert [tuple(letter) for letter in letters] == [
        (topic, 2, offset, value) for offset, (_, value, _) in zip((0, 2, 4, 6, 8, 9), poison, strict=True)
    ]
    # Its offsets are lost, and all is delivered again: no second letter.
    again = worker_with({}, database_url, kafka_for(kafka, topic, group=f"{topic}-again"))
    with watching() as facts:
        async with running(again):
            await facts.until("DUPLICATE_EVENT", count=4)
            await eventually(lambda: has_read(kafka, topic, f"{topic}-again", {2: 10}), 20)
    assert facts.of("DLQ_EVENT") == []
    assert await connection.fetchval("SELECT count(*) FROM dead_letter_events") == 6


async def test_many_poisoned_records_in_a_row_are_buried_in_groups(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    async with producing(kafka) as producer:
        await asyncio.gather(*[await producer.send(topic, b"not JSON", partition=1) for _ in range(1000)])
    with watching() as facts:
        async with running(worker_with({}, database_url, kafka_for(kafka, topic))):
            await facts.until("DLQ_EVENT", count=1000)
    # One after the other, each with a commit of its own, ten thousand of them held up their partition for a minute.
    transactions = await connection.fetchval("SELECT count(DISTINCT xmin::text) FROM dead_letter_events")
    assert transactions < 100


async def test_events_that_another_producer_compressed_are_read(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    codecs = ("gzip", "lz4", "snappy", "zstd")
    for codec in codecs:
        key, value, headers = (await message_of(connection, await insert_event(connection))).encode()
        producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, compression_type=codec)
        await producer.start()
        try:
            await producer.send_and_wait(topic, value, key, headers=headers)
        finally:
            await producer.stop()
    with watching() as facts:
        async with running(worker_with({}, database_url, kafka_for(kafka, topic))):
            await facts.until("EVENT_PROCESSED", count=len(codecs))


async def has_read(broker: Broker, topic: str, group: str, wanted: dict[int, int]) -> bool:
    return await committed_offsets(broker, topic, group) == wanted


async def test_the_worker_says_who_it_is_when_it_has_come_up(database_url: str, kafka: Broker, topic: str) -> None:
    started = asyncio.Event()
    with watching() as facts:
        worker = worker_with({}, database_url, kafka_for(kafka, topic), worker_id="payment-worker-7", started=started.set)
        async with running(worker):
            startup = await facts.until("STARTUP")
            assert started.is_set()
    assert startup["workerId"] == "payment-worker-7"
    assert topic in startup["message"]
