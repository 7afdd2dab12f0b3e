"""The program's own parts inside a test: made against a test's servers, run, and listened to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from orderflow.embedded.kafka import ApacheKafka
from orderflow.engine import telemetry
from orderflow.engine.circuit import Circuit
from orderflow.engine.executor import Executor
from orderflow.engine.handling import Handler
from orderflow.engine.ids import new_id
from orderflow.engine.kafka import Kafka
from orderflow.engine.postgres import Database
from orderflow.engine.retry import RetryPolicy
from orderflow.engine.worker import Worker
from orderflow.payments.gateway import Charge, ChargeRequest, Gateway
from orderflow.payments.handlers import SUBJECTS, ChargeHandler
from orderflow.settings import Settings
from orderflow.supervisor import Service
from tests.rows import record_of
from tests.servers import Broker

# For what takes milliseconds on an idle machine: the machine that runs the tests is not always idle.
PATIENCE = 30.0
QUICK = RetryPolicy(3, base=0.001, cap=0.001)


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

    def take(self, service: str, event: str, facts: Iterable[Mapping[str, Any]]) -> None:
        """A telemetry subscriber."""
        self.seen.extend(Fact(service, event, dict(fields)) for fields in facts)
        self._news.set()

    def end(self) -> None:
        """No more will come."""
        self.ended = True
        self._news.set()

    def of(self, event: str, service: str | None = None, **fields: object) -> list[Mapping[str, Any]]:
        """The fields of every fact of that name which has these fields."""
        return [
            fact.fields
            for fact in self.seen
            if fact.event == event and service in (None, fact.service) and fields.items() <= fact.fields.items()
        ]

    async def until(self, event: str, *, count: int = 1, timeout: float = PATIENCE, **fields: Any) -> Mapping[str, Any]:
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


Finished = Callable[[BaseException | None], None]


def in_tasks(work: Callable[[Any], Awaitable[None]]) -> Callable[[Any, Finished], None]:
    """A coroutine function as what the consumer starts: its end is told, unless it was cancelled."""
    tasks: set[asyncio.Task[None]] = set()

    def start(item: Any, finished: Finished) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled():
                finished(task.exception())

        async def run() -> None:
            await work(item)

        task = asyncio.create_task(run())
        tasks.add(task)
        task.add_done_callback(ended)

    return start


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
    handlers: Mapping[str, Handler], url: str, kafka: Kafka, *, policy: RetryPolicy = QUICK,
    worker_id: str = "payment-worker-1",
    started: Callable[[], None] = lambda: None, **changes: Any,
) -> Worker:  # fmt: skip
    """A worker with handlers of the test's own."""

    async def made(_database: Database, _stack: object) -> Mapping[str, Handler]:
        return handlers

    changes = {"commit_interval": 0.05, **changes}
    return Worker(opening(url), kafka, made, policy, worker_id=worker_id, started=started, **changes)


@asynccontextmanager
async def executing(
    url: str, gateway: Gateway | None = None, *, handlers: Mapping[str, Handler] | None = None,
    worker_id: str = "payment-worker-1", policy: RetryPolicy = QUICK, timeout: float = 5.0, failures: int = 0,
) -> AsyncIterator[Executor]:  # fmt: skip
    """An executor with the payment's handler and this gateway, or with the handlers given; `failures`: see Circuit."""
    async with opened(url, size=8) as database:
        circuit = Circuit(database, "gateway", worker_id=worker_id, failures=failures)
        charge = ChargeHandler(database, gateway or FakeGateway(), circuit, worker_id=worker_id, timeout=timeout)
        chosen = {"OrderCreated": charge} if handlers is None else handlers
        executor = Executor(database, chosen, policy, worker_id=worker_id, subjects=SUBJECTS)
        try:
            yield executor
        finally:
            await executor.close()
            await charge.close()
            await circuit.close()


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


async def deliver(
    connection: asyncpg.Connection, url: str, gateway: Any, event_id: UUID, times: int = 1, timeout: float = 5.0
) -> Facts:
    """Deliver the event as the attempt that it is at, that many times; returns what was told."""
    with watching() as facts:
        async with executing(url, gateway, timeout=timeout) as executor:
            for _ in range(times):
                await executor.execute(await record_of(connection, event_id))
    return facts
