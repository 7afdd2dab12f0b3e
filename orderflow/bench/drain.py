"""T8: the relay alone against a backlog, as after an outage of Kafka: a million rows that are due, nobody else at work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from orderflow import audit
from orderflow.bench import database
from orderflow.bench.program import Program, ProgramFailed
from orderflow.bench.servers import Servers, Target
from orderflow.bench.throughput import Audited
from orderflow.bench.usage import Meter
from orderflow.engine.kafka import Kafka, bounded

FILL_ROWS = 100_000
FILL_TIMEOUT = 120.0
POLL = 0.1
# Below this rate the drain is given up.
SLOWEST_RATE = 500.0
START_TIMEOUT = 60.0
# Nobody consumes: the janitor would rightly publish again what is not processed after its horizon, and blur the rate.
RECONCILE_SECONDS = 86_400

_FILL = """
INSERT INTO outbox (event_type, aggregate_type, aggregate_id, payload)
SELECT 'OrderPaid', 'order', id,
       jsonb_build_object('orderId', id, 'userId', gen_random_uuid(), 'amount', ((1 + random() * 998)::numeric(12,2))::text,
                          'chargeId', gen_random_uuid())
FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, $1::integer)) AS t
"""
_ANY_UNMARKED = "SELECT EXISTS (SELECT FROM outbox WHERE published_at IS NULL)"


@dataclass(frozen=True, slots=True)
class Drained:
    """Rates in events a second, by the growth of the topic; the clock starts at the first record.

    `first_rate` and `last_rate` are those of the first and the last tenth. `marked_seconds`: from the first record until
    every row carries published_at. `records`: what the topic holds in the end; more than `rows` means that some were sent
    twice. `peak_bytes`: the peak of each publisher's memory, as far as the system tells.
    """

    rows: int
    records: int
    events_per_second: float
    first_rate: float
    last_rate: float
    marked_seconds: float
    peak_bytes: list[int]
    audited: Audited


async def measure(servers: Servers, directory: Path, *, rows: int, publishers: int) -> Drained:
    """Fill an outbox, then let `publishers` processes with that role alone drain it. Raises EmbeddedError, ProgramFailed."""
    async with servers.fresh() as target, AsyncExitStack() as stack:
        connection = await database.connected(target.database_url)
        stack.push_async_callback(connection.close, timeout=5)
        await _fill(connection, rows)
        offsets = await _Offsets.open(target)
        stack.push_async_callback(offsets.close)
        settings = {**target.environment(), "ORDERFLOW_RECONCILE_SECONDS": str(RECONCILE_SECONDS)}
        programs = [
            Program(("--role", "publisher"), settings, directory, name=f"{target.topic}-{number}")
            for number in range(1, publishers + 1)
        ]
        for program in programs:
            stack.push_async_callback(program.stop)
        watching = asyncio.create_task(offsets.until(rows, timeout=START_TIMEOUT + rows / SLOWEST_RATE))
        stack.callback(watching.cancel)
        await asyncio.gather(*(program.start() for program in programs))
        meter = Meter({f"publisher {number}": program.pid for number, program in enumerate(programs, 1)})
        meter.start()
        try:
            growth = await watching
            marked = await _until_marked(connection, timeout=START_TIMEOUT)
        except TimeoutError:
            raise ProgramFailed(f"the backlog was not drained in time: {programs[0].log_tail()}") from None
        peaks = [usage.peak_bytes for usage in await meter.stop()]
        codes = [await program.stop() for program in programs]
        records = await offsets.total()
        return Drained(
            rows, records, *rates(growth, rows), marked - growth[0][0], peaks,
            await _audited(connection, f"a backlog of {rows} rows, publishers: {publishers}", rows, records, codes),
        )  # fmt: skip


async def _fill(connection: asyncpg.Connection, rows: int) -> None:
    for done in range(0, rows, FILL_ROWS):
        await connection.execute(_FILL, min(FILL_ROWS, rows - done), timeout=FILL_TIMEOUT)
    await connection.execute("VACUUM (ANALYZE) outbox", timeout=FILL_TIMEOUT)
    # What the filling left in memory must not be written during the drain.
    with suppress(asyncpg.InsufficientPrivilegeError):
        await connection.execute("CHECKPOINT", timeout=FILL_TIMEOUT)


async def _until_marked(connection: asyncpg.Connection, *, timeout: float) -> float:
    """Wait until every row carries published_at; returns when, in monotonic seconds. Raises TimeoutError."""
    end = time.monotonic() + timeout
    while await connection.fetchval(_ANY_UNMARKED):
        if time.monotonic() >= end:
            raise TimeoutError
        await asyncio.sleep(POLL)
    return time.monotonic()


async def _audited(connection: asyncpg.Connection, run: str, rows: int, records: int, codes: Sequence[int]) -> Audited:
    """I4 alone: events without orders and without a worker have broken the others from the beginning."""
    row = await connection.fetchrow(audit.statement(audit.I4), 0.0, 0.0, None, timeout=FILL_TIMEOUT)
    assert row is not None
    finding = audit.Finding(audit.I4.name, audit.I4.text, row["checked"], row["violations"], list(row["examples"]))
    problems = [f"I4 violated: {finding.examples[0]}"] if finding.violations else []
    if finding.checked != rows:
        problems.append(f"{rows} rows were written, and {finding.checked} are there")
    if records != rows:
        problems.append(f"{rows} rows were to be published, and the topic holds {records} records")
    if any(codes):
        problems.append(f"the publishers ended with exit codes {codes}")
    return Audited(run, [finding], problems)


class _Offsets:
    """How many records the topic holds."""

    def __init__(self, consumer: AIOKafkaConsumer, partitions: list[TopicPartition]) -> None:
        self._consumer = consumer
        self._partitions = partitions

    @classmethod
    async def open(cls, target: Target) -> _Offsets:
        """The topic is made as the program makes it: its making is no part of the drain. Raises DependencyUnavailable."""
        kafka = Kafka(target.bootstrap, target.topic, embedded=target.embedded_broker)
        count = await kafka.ensure_topic()
        consumer = AIOKafkaConsumer(**kafka.options())
        await consumer.start()
        return cls(consumer, [TopicPartition(target.topic, number) for number in range(count)])

    async def total(self) -> int:
        ends: dict[TopicPartition, int] = await self._consumer.end_offsets(self._partitions)
        return sum(ends.values())

    async def until(self, records: int, *, timeout: float) -> list[tuple[float, int]]:
        """Look until that many are there: (monotonic seconds, records), the last look without any first.

        Raises TimeoutError.
        """
        growth: list[tuple[float, int]] = []
        async with asyncio.timeout(timeout):
            while not growth or growth[-1][1] < records:
                # A topic that has just been made may have no leader yet.
                with suppress(KafkaError):
                    now = (time.monotonic(), await self.total())
                    growth = [*growth, now] if now[1] else [now]
                await asyncio.sleep(POLL)
        return growth

    async def close(self) -> None:
        await bounded(self._consumer.stop(), 2.0)


def rates(growth: Sequence[tuple[float, int]], rows: int) -> tuple[float, float, float]:
    """Events a second: on the whole, in the first and in the last tenth. `growth`: (seconds, records), none at the first."""
    tenth = rows / 10
    begun, first, last, ended = (_reached(growth, count) for count in (0, tenth, rows - tenth, rows))
    return rows / (ended - begun), tenth / (first - begun), tenth / (ended - last)


def _reached(growth: Sequence[tuple[float, int]], count: float) -> float:
    """When there were that many records, between the two looks around it as if they had come evenly."""
    before = growth[0]
    for after in growth[1:]:
        if after[1] >= count and after[1] > before[1]:
            share = max(0.0, (count - before[1]) / (after[1] - before[1]))
            return before[0] + share * (after[0] - before[0])
        before = after
    return before[0]
