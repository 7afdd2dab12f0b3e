"""The program's parts inside a test, and the program as subprocesses: started, told to stop, and waited for by what they say."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, Self
from uuid import UUID

import asyncpg
import orjson
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from orderflow.audit import audit
from orderflow.embedded.kafka import ApacheKafka
from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.engine import telemetry
from orderflow.engine.dead_letters import Place
from orderflow.engine.executor import Executor, Handler, Record
from orderflow.engine.ids import new_id
from orderflow.engine.kafka import Kafka
from orderflow.engine.message import Message
from orderflow.engine.postgres import Database
from orderflow.engine.retry import RetryPolicy
from orderflow.engine.worker import Worker
from orderflow.orders import store as orders
from orderflow.payments.gateway import Charge, ChargeRequest, Gateway
from orderflow.payments.handlers import ChargeHandler
from orderflow.settings import Settings
from orderflow.supervisor import Service
from tests.servers import Broker, cloned_database
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parent.parent
# For what takes milliseconds on an idle machine: the machine that runs the tests is not always idle.
PATIENCE = 30.0
QUICK = RetryPolicy(3, base=0.001, cap=0.001)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one_database(migrated_postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """One database for a module whose tests look at rows of their own only: `database_url = one_database` in the module."""
    async with cloned_database(migrated_postgres) as url:
        yield url


class Fact(NamedTuple):
    """One fact that telemetry told, or one line of a process's log."""

    service: str
    event: str
    fields: Mapping[str, Any]


class Facts:
    """The facts in the order in which they came; `until` waits for those to come."""

    def __init__(self) -> None:
        self.seen: list[Fact] = []
        self.ended = False
        self._news = asyncio.Event()

    def take(self, service: str, event: str, fields: Mapping[str, Any]) -> None:
        """A telemetry subscriber."""
        self.seen.append(Fact(service, event, dict(fields)))
        self._news.set()

    def end(self) -> None:
        """No more will come."""
        self.ended = True
        self._news.set()

    def of(self, event: str, **fields: object) -> list[Mapping[str, Any]]:
        """The fields of every fact of that name which has these fields."""
        return [fact.fields for fact in self.seen if fact.event == event and fields.items() <= fact.fields.items()]

    async def until(self, event: str, *, count: int = 1, timeout: float = PATIENCE, **fields: object) -> Mapping[str, Any]:
        """Wait until there are `count` such facts; returns the last of them."""
        try:
            async with asyncio.timeout(timeout):
                while len(found := self.of(event, **fields)) < count:
                    self._news.clear()
                    assert not self.ended, f"ended without {count} x {event} {fields}"
                    await self._news.wait()
        except (TimeoutError, AssertionError) as error:
            told = "\n".join(f"  {fact.service} {fact.event} {dict(fact.fields)}" for fact in self.seen[-40:])
            raise AssertionError(f"no {count} x {event} {fields}: {error!r}; the last facts:\n{told}") from None
        return found[count - 1]


@contextmanager
def watching() -> Iterator[Facts]:
    """All facts that are told in this process while the block runs."""
    facts = Facts()
    with telemetry.subscribed(facts.take):
        yield facts


@asynccontextmanager
async def running(*services: Service, timeout: float = 20.0) -> AsyncIterator[asyncio.Event]:
    """Run services side by side; at the end of the block they drain. A service that raises ends the block with its error."""
    stopping = asyncio.Event()
    block = asyncio.current_task()
    assert block is not None
    tasks = [asyncio.create_task(service.run(stopping), name=service.name) for service in services]
    crashes: list[BaseException] = []

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            crashes.append(error)
            if not stopping.is_set():
                block.cancel()

    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield stopping
    except asyncio.CancelledError:
        if not crashes:
            raise
        block.uncancel()
    finally:
        stopping.set()
        _, late = await asyncio.wait(tasks, timeout=timeout)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if crashes:
        raise crashes[0]
    assert not late, f"did not drain: {late}"


def settings_for(url: str, broker: Broker, topic: str, **changes: Any) -> Settings:
    """Settings for the program's own parts against a test's servers, with short times; nothing is read from outside."""
    given: dict[str, Any] = {
        "database_url": url, "kafka_bootstrap_servers": broker.bootstrap, "topic": topic, "consumer_group": topic,
        "kafka_embedded": not isinstance(broker, ApacheKafka), "gateway_delay_ms": 0, "backoff_base_ms": 1,
        "commit_interval_ms": 50, "http_port": 0, "topic_partitions": 4, **changes,
    }  # fmt: skip
    return Settings(_env_file=None, **given)


def kafka_for(broker: Broker, topic: str, **changes: Any) -> Kafka:
    """Kafka for a part that is made by hand; the consumer group is named like the topic."""
    embedded = not isinstance(broker, ApacheKafka)
    return Kafka(
        **{"bootstrap": broker.bootstrap, "topic": topic, "group": topic, "embedded": embedded, "partitions": 4, **changes}
    )


def opening(url: str, **changes: Any) -> Callable[[], Any]:
    """Opens a pool when it is called, as the parts want it."""

    async def open_database() -> Database:
        return await Database.open(url, **{"size": 4, "timeout": 5.0, **changes})

    return open_database


@asynccontextmanager
async def opened(url: str, **changes: Any) -> AsyncIterator[Database]:
    """A pool for the length of the block."""
    database = await opening(url, **changes)()
    try:
        yield database
    finally:
        await database.close()


def worker_with(
    handlers: Mapping[str, Handler], url: str, kafka: Kafka, *, policy: RetryPolicy = QUICK, worker_id: str = "payment-worker-1",
    started: Callable[[], None] = lambda: None, **changes: Any,
) -> Worker:  # fmt: skip
    """A worker with handlers of the test's own."""

    async def made(_database: Database, _stack: object) -> Mapping[str, Handler]:
        return handlers

    changes = {"commit_interval": 0.05, **changes}
    return Worker(opening(url), kafka, made, policy, worker_id=worker_id, started=started, **changes)


@asynccontextmanager
async def executing(
    url: str, gateway: Gateway | None = None, *, handlers: Mapping[str, Handler] | None = None, worker_id: str = "payment-worker-1",
    policy: RetryPolicy = QUICK, timeout: float = 5.0,
) -> AsyncIterator[Executor]:  # fmt: skip
    """An executor with the payment's handler and this gateway, or with the handlers given."""
    async with opened(url, size=8) as database:
        charge = ChargeHandler(database, gateway or FakeGateway(), worker_id=worker_id, timeout=timeout)
        chosen = {"OrderCreated": charge} if handlers is None else handlers
        executor = Executor(database, chosen, policy, worker_id=worker_id)
        try:
            yield executor
        finally:
            await executor.close()
            await charge.close()


class FakeGateway:
    """A gateway in memory: `charges` are its books, and each behaviour can be replaced by a function of the test's."""

    def __init__(self) -> None:
        self.charges: dict[UUID, Charge] = {}
        self.requests: list[ChargeRequest] = []
        self.asked: list[UUID] = []
        self.on_charge: Callable[[ChargeRequest], Any] = self.book
        self.on_find: Callable[[UUID], Any] = self.charges.get

    def book(self, request: ChargeRequest) -> Charge:
        """Make the charge, once for its reference."""
        charge = Charge(new_id(), request.reference, request.amount, datetime.now(UTC))
        return self.charges.setdefault(request.reference, charge)

    async def charge(self, request: ChargeRequest) -> Charge:
        """See Gateway.charge."""
        self.requests.append(request)
        return await _result(self.on_charge(request))

    async def find(self, reference: UUID) -> Charge | None:
        """See Gateway.find."""
        self.asked.append(reference)
        return await _result(self.on_find(reference))


async def _result(value: Any) -> Any:
    return await value if asyncio.iscoroutine(value) or isinstance(value, asyncio.Future) else value


class Placed(NamedTuple):
    """An order of the test's and its OrderCreated event."""

    order_id: UUID
    event_id: UUID


async def place(
    connection: asyncpg.Connection, count: int = 1, amount: str = "10.50", trace: str | None = None
) -> list[Placed]:
    """Place orders as the API does, with an event each."""
    headers = json.dumps({"traceparent": trace}) if trace else None
    new = [orders.NewOrder(new_id(), new_id(), uuid.uuid4(), Decimal(amount), headers=headers) for _ in range(count)]
    await orders.place(connection, new)
    return [Placed(order.order_id, order.event_id) for order in new]


async def message_of(connection: asyncpg.Connection, event_id: UUID) -> Message:
    """The event in the outbox, as a relay would fetch it now."""
    row = await connection.fetchrow(
        "SELECT event_id, event_type, aggregate_type, aggregate_id, payload, created_at, attempt, headers FROM outbox"
        " WHERE event_id = $1",
        event_id,
    )
    *fields, headers = row.values()
    return Message(*fields, headers=orjson.loads(headers) if headers else {})


async def record_of(connection: asyncpg.Connection, event_id: UUID, offset: int = 0) -> Record:
    """The Kafka record that carries the event now."""
    return as_record(await message_of(connection, event_id), offset)


def as_record(message: Message, offset: int = 0) -> Record:
    """A message as a fetched record."""
    key, value, headers = message.encode()
    return Record(Place("test", 0, offset), key, value, headers)


async def insert_event(
    connection: asyncpg.Connection, aggregate_id: UUID | None = None, kind: str = "Shipped", payload: str = '{"n": 1}'
) -> UUID:
    """Insert an outbox row as any other program would, with plain SQL; returns its event id."""
    return await connection.fetchval(
        "INSERT INTO outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ($1, 'parcel', $2, $3) RETURNING event_id",
        kind, aggregate_id or uuid.uuid4(), payload,
    )  # fmt: skip


async def order_row(connection: asyncpg.Connection, order_id: UUID) -> tuple[str, int, str | None]:
    """State, version and failure of an order."""
    row = await connection.fetchrow("SELECT state, version, failure FROM orders WHERE id = $1", order_id)
    return tuple(row)


async def states(connection: asyncpg.Connection) -> dict[str, int]:
    """How many orders are in each state."""
    return dict(await connection.fetch("SELECT state, count(*) FROM orders GROUP BY state"))


async def events_of(connection: asyncpg.Connection, order_id: UUID) -> list[str]:
    """The types of an order's events in their order."""
    rows = await connection.fetch("SELECT event_type FROM outbox WHERE aggregate_id = $1 ORDER BY seq", order_id)
    return [row["event_type"] for row in rows]


async def is_processed(connection: asyncpg.Connection, event_id: UUID) -> bool:
    """Whether the event is recorded as processed."""
    return await connection.fetchval("SELECT EXISTS (SELECT FROM processed_events WHERE event_id = $1)", event_id)


async def dead_letter(connection: asyncpg.Connection, event_id: UUID) -> asyncpg.Record | None:
    """The dead letter of an event, with `attempts` parsed by nobody."""
    return await connection.fetchrow("SELECT * FROM dead_letter_events WHERE event_id = $1", event_id)


async def charges_of(connection: asyncpg.Connection, order_id: UUID) -> list[str]:
    """The simulated gateway's entries for an order."""
    rows = await connection.fetch("SELECT status FROM gateway_charges WHERE reference = $1", order_id)
    return [row["status"] for row in rows]


async def set_mode(connection: asyncpg.Connection, mode: str) -> None:
    """Switch the simulated gateway."""
    await connection.execute("UPDATE gateway_control SET mode = $1", mode)


async def all_settled(connection: asyncpg.Connection) -> bool:
    """Whether every order is terminal and every event processed or buried."""
    return await connection.fetchval("""
        SELECT NOT EXISTS (SELECT FROM orders WHERE state IN ('CREATED', 'PAYMENT_PENDING'))
           AND NOT EXISTS (SELECT FROM outbox o WHERE NOT EXISTS (SELECT FROM processed_events p WHERE p.event_id = o.event_id)
                                                  AND NOT EXISTS (SELECT FROM dead_letter_events d WHERE d.event_id = o.event_id))
           AND NOT EXISTS (SELECT FROM outbox WHERE published_at IS NULL AND available_at IS DISTINCT FROM 'infinity')""")


async def settled(connection: asyncpg.Connection, timeout: float = 60.0) -> None:
    """Wait until nothing is left to do."""
    await eventually(lambda: all_settled(connection), timeout, what="every order and event is settled")


async def violations(connection: asyncpg.Connection, accepted: Sequence[UUID] | None = None) -> dict[str, list[str]]:
    """What the audit finds, with horizons of zero: for a database in which nothing is left to do."""
    found = await audit(connection, retry_horizon=0, reconcile_horizon=0, accepted=accepted)
    return {finding.invariant: finding.examples for finding in found if finding.violations}


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


async def committed_offsets(broker: Broker, group: str) -> dict[int, int]:
    """What the group has committed, by partition."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        offsets = await admin.list_consumer_group_offsets(group)
        return {place.partition: found.offset for place, found in offsets.items() if found.offset >= 0}
    finally:
        await admin.close()


@dataclass
class Process:
    """`orderflow` as a process of its own; its JSON log lines are `facts`, other lines are `said`, and stderr is `errors`."""

    process: asyncio.subprocess.Process
    facts: Facts
    said: list[str]
    errors: list[str]
    readers: list[asyncio.Task[None]]

    @classmethod
    async def start(cls, *arguments: str, environment: Mapping[str, str]) -> Self:
        """Start it with these arguments and settings, and nothing of what is set outside."""
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("ORDERFLOW_")}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "orderflow", *arguments, cwd=ROOT, env={**inherited, **environment}, limit=2**20,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self = cls(process, Facts(), [], [], [])
        self.readers = [asyncio.create_task(self._read()), asyncio.create_task(self._read_errors())]
        return self

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            try:
                document = json.loads(line)
            except ValueError:
                self.said.append(line.decode().rstrip())
                continue
            self.facts.take(document.pop("service"), document.pop("type"), document)
        self.facts.end()

    async def _read_errors(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.errors.append(line.decode().rstrip())

    def kill(self) -> None:
        """SIGKILL: no last words."""
        self.process.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM: drain."""
        self.process.send_signal(signal.SIGTERM)

    async def end(self, timeout: float = PATIENCE) -> int:
        """Wait for its end; returns the exit code."""
        async with asyncio.timeout(timeout):
            code = await self.process.wait()
            await asyncio.gather(*self.readers)
        return code

    async def close(self) -> None:
        """Leave nothing of it behind."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.end()


class Fleet:
    """Processes of one test, all against the same servers; ended with the test."""

    def __init__(self, url: str, bootstrap: str, topic: str, **environment: str) -> None:
        self.environment = {
            "DATABASE_URL": url, "KAFKA_BOOTSTRAP_SERVERS": bootstrap, "HTTP_PORT": "0", "ORDERFLOW_TOPIC": topic,
            "ORDERFLOW_CONSUMER_GROUP": topic, "ORDERFLOW_LOG_FORMAT": "json", "ORDERFLOW_GATEWAY_DELAY_MS": "20",
            "ORDERFLOW_BACKOFF_BASE_MS": "20", "ORDERFLOW_TOPIC_PARTITIONS": "4", "ORDERFLOW_RECONCILE_SECONDS": "5", **environment,
        }  # fmt: skip
        self.processes: list[Process] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(process.close() for process in self.processes))

    async def run(self, *arguments: str, **environment: str) -> Process:
        """`orderflow run` with these arguments."""
        return await self.start("run", *arguments, **environment)

    async def start(self, *arguments: str, **environment: str) -> Process:
        """`orderflow` with these arguments."""
        process = await Process.start(*arguments, environment={**self.environment, **environment})
        self.processes.append(process)
        return process
