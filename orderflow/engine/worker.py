"""The worker role: one consumer and one executor, made afresh for each run of the role."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack

from orderflow.engine import processed
from orderflow.engine.consumer import Consumer
from orderflow.engine.executor import Executor
from orderflow.engine.handling import Handler
from orderflow.engine.kafka import Kafka
from orderflow.engine.postgres import Database
from orderflow.engine.retry import RetryPolicy
from orderflow.engine.telemetry import WORKER, emit
from orderflow.engine.watchdog import watched

# Builds the handlers by event type on the worker's database; what they hold is closed with the stack.
HandlerFactory = Callable[[Database, AsyncExitStack], Awaitable[Mapping[str, Handler]]]


class Worker:
    """Consumes events and handles them until told to stop; times in seconds.

    `delivery_limit`: what a delivery may take; `stall`: for how long after that, or while there is something to fetch, nothing
    may be done before the role is restarted.
    """

    name = "worker"

    def __init__(
        self, open_database: Callable[[], Awaitable[Database]], kafka: Kafka, handlers: HandlerFactory, policy: RetryPolicy, *,
        worker_id: str, subjects: Mapping[str, str] | None = None,
        max_in_flight: int = 5000, commit_interval: float = 0.5, drain_timeout: float = 8.0,
        batch: int = 500, in_flight: int = 4, delivery_limit: float = 15.0, stall: float = 30.0,
        started: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._open_database = open_database
        self._kafka = kafka
        self._handlers = handlers
        self._policy = policy
        self._worker_id = worker_id
        self._subjects = subjects
        self._max_in_flight = max_in_flight
        self._commit_interval = commit_interval
        self._drain_timeout = drain_timeout
        self._batch = batch
        self._in_flight = in_flight
        self._delivery_limit = delivery_limit
        self._stall = stall
        self._started = started

    async def run(self, stopping: asyncio.Event) -> None:
        """Consume until `stopping` is set, then finish what is in flight within the drain time-out."""
        async with AsyncExitStack() as stack:
            database = await self._open_database()
            stack.push_async_callback(database.close)
            handlers = await self._handlers(database, stack)
            executor = Executor(
                database, handlers, self._policy, worker_id=self._worker_id, subjects=self._subjects, batch=self._batch,
                in_flight=self._in_flight,
            )  # fmt: skip
            stack.push_async_callback(executor.close)
            consumer = Consumer(
                self._kafka, executor.start, client_id=self._worker_id, max_in_flight=self._max_in_flight,
                commit_interval=self._commit_interval, drain_timeout=self._drain_timeout, delivery_limit=self._delivery_limit,
                started=self._tell_started,
            )  # fmt: skip
            tables = set((self._subjects or {}).values())
            await watched(
                consumer.run(stopping), stopping, service=WORKER, role=self.name, limit=self._stall, progress=consumer.progress,
                due=lambda: consumer.due(lambda: processed.refuse_unless_writable(database, tables)),
            )  # fmt: skip

    def _tell_started(self) -> None:
        message = f"consuming {self._kafka.topic} as {self._kafka.group}"
        emit(WORKER, "STARTUP", workerId=self._worker_id, message=message)
        self._started()
