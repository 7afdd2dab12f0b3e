"""One delivery as a pipeline of named steps: decode -> dedupe -> handle -> settle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import Protocol
from uuid import UUID, uuid5

from orderflow.engine import dead_letters, outbox, processed
from orderflow.engine.batcher import Batcher
from orderflow.engine.dead_letters import Place
from orderflow.engine.message import Headers, Message, Undecodable
from orderflow.engine.outcome import Dead, Done, Duplicate, Outcome, Retry
from orderflow.engine.patience import ENDLESS
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.processed import Known
from orderflow.engine.retry import Permanent, RetryPolicy
from orderflow.engine.telemetry import WORKER, emit, observe

# Name space of the ids that undecodable records get: derived from the record's place, so that a redelivery is no second letter.
UNDECODABLE = UUID("6f726465-7266-4c6f-a77d-6465616400ff")


@dataclass(frozen=True, slots=True)
class Record:
    """A Kafka record as it was fetched."""

    place: Place
    key: bytes | None
    value: bytes | None
    headers: Headers


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event on its way through a worker. `failures`: failed attempts before this one, since the last redrive."""

    message: Message
    place: Place
    worker_id: str
    failures: int


class SettledMeanwhile(Exception):
    """The event that was about to be buried has been settled by another delivery."""


class Burial(Protocol):
    """What the burial of one type of event means for the domain."""

    async def on_buried(self, connection: Connection, message: Message, reason: str) -> Callable[[], None]:
        """Write it in the burial's own transaction; returns what to tell after the commit.

        Raises SettledMeanwhile to undo the burial: another delivery has finished the work.
        """
        ...


class Handler(Burial, Protocol):
    """What a worker does with one type of event."""

    async def handle(self, delivery: Delivery) -> Outcome:
        """Do the work. Raising Permanent buries the event, any other error is retried by the policy."""
        ...

    async def before_giving_up(self, delivery: Delivery) -> Outcome | None:
        """Called before an event is buried for an error: an outcome if the work turns out to be done after all.

        Raises OutcomeUnknown when that cannot be told: then the event is not buried.
        """
        ...


class Executor:
    """Runs deliveries; one instance a worker. Database outages are waited out: nothing that was begun is lost by them."""

    def __init__(
        self, database: Database, handlers: Mapping[str, Handler], policy: RetryPolicy, *,
        worker_id: str, subjects: Mapping[str, str] | None = None, batch: int = 500, in_flight: int = 4,
        random: Random | None = None,
    ) -> None:  # fmt: skip
        """`subjects`: see processed.record_statement; for event types without a handler."""
        self._database = database
        self._handlers = handlers
        self._policy = policy
        self._worker_id = worker_id
        self._random = random or Random()
        options = {"size": batch, "in_flight": in_flight, "patience": ENDLESS}
        self._lookups = Batcher[UUID, Known | None](lambda ids: processed.look_up(database, ids), **options)  # type: ignore[arg-type]
        record = processed.record_statement(subjects or {})
        self._records = Batcher[Message, bool](lambda ms: processed.record(database, record, ms, worker_id), **options)  # type: ignore[arg-type]
        self._retries = Batcher[outbox.Republish, bool](lambda rs: outbox.republish_if_attempt(database, rs), **options)  # type: ignore[arg-type]

    async def execute(self, record: Record) -> None:
        """Take one record through all steps; returns when it is settled, whatever came of it."""
        try:
            message = Message.decode(record.value, record.headers)
        except Undecodable as error:
            await self._bury_undecodable(record, error)
            return
        emit(WORKER, "EVENT_RECEIVED", eventId=message.id, eventType=message.type)
        if message.attempt == 1:
            observe("received", (datetime.now(UTC) - message.created_at.astimezone(UTC)).total_seconds())
        handler = self._handlers.get(message.type)
        # What nobody handles is only recorded, and usually new: the record alone tells, without a look before it.
        if handler is None and await self._records.submit(message):
            emit(WORKER, "EVENT_PROCESSED", eventId=message.id, eventType=message.type)
            return
        known = await self._lookups.submit(message.id)
        if known is None:
            reason = "Unknown event: no outbox row in this database"
            await self._bury_foreign(record, message.id, reason, None, message)
            return
        if (known.event_type, known.aggregate_id) != (message.type, message.aggregate_id):
            # Under an id of its own: buried under the event's, the forgery would take the true event with it.
            other = "aggregate" if known.aggregate_id != message.aggregate_id else "type"
            reason = f"Foreign event: its outbox row tells of another {other}"
            await self._bury_foreign(record, uuid5(UNDECODABLE, repr(record.place)), reason, None, message)
            return
        delivery = Delivery(message, record.place, self._worker_id, max(0, known.attempt - known.first_attempt))
        if not known.is_fresh(message.attempt):
            await self._settle(delivery, Duplicate())
        elif handler is None:
            # Its outbox row may have been committed after the first look. If not, what it tells of does not exist.
            reason = f"Unknown {message.aggregate_type}: not in this database"
            recorded = await self._records.submit(message)
            await self._settle(delivery, Done(recorded=True) if recorded else Dead(reason, Permanent(reason)))
        else:
            await self._settle(delivery, await self._handle(handler, delivery))

    async def _handle(self, handler: Handler, delivery: Delivery) -> Outcome:
        try:
            return await handler.handle(delivery)
        except Exception as error:
            return await self._decide(handler, delivery, error)

    async def _decide(self, handler: Handler, delivery: Delivery, error: BaseException) -> Outcome:
        failures = delivery.failures + 1
        emit(
            WORKER,
            "PROCESSING_ERROR",
            eventId=delivery.message.id,
            error=str(error) or type(error).__name__,
            retryCount=failures,
        )
        decided = self._policy.decide(failures, error, self._random)
        if isinstance(decided, Dead) and not isinstance(error, Permanent):
            try:
                return await handler.before_giving_up(delivery) or decided
            except Exception as unknown:
                # Not known whether the work is done outside: burying could fail an order that was paid.
                return self._policy.retry(failures, unknown, self._random)
        return decided

    async def _settle(self, delivery: Delivery, outcome: Outcome) -> None:
        message = delivery.message
        match outcome:
            case Done(recorded=recorded):
                if recorded or await self._records.submit(message):
                    emit(WORKER, "EVENT_PROCESSED", eventId=message.id, eventType=message.type)
                else:
                    self._tell_duplicate(message)
            case Duplicate():
                self._tell_duplicate(message)
            case Retry(delay=delay, error=error):
                if await self._retries.submit(outbox.Republish(message.id, delay, outbox.Failure.of(message.attempt, error))):
                    emit(
                        WORKER, "RETRY_SCHEDULED", eventId=message.id, retryCount=delivery.failures + 1,
                        maxRetries=self._policy.max_attempts, delayMs=round(delay.total_seconds() * 1000),
                    )  # fmt: skip
            case Dead(reason=reason, error=error):
                await ENDLESS.run(lambda: self._bury(delivery, reason, error))

    def _tell_duplicate(self, message: Message) -> None:
        emit(WORKER, "DUPLICATE_EVENT", eventId=message.id, message="Event already processed, skipping")

    async def _bury(self, delivery: Delivery, reason: str, error: BaseException | None) -> None:
        handler = self._handlers.get(delivery.message.type)
        try:
            async with self._database.transaction() as connection:
                buried = await dead_letters.bury_if_attempt(
                    connection, delivery.message, reason=reason, error=error, place=delivery.place,
                    worker_id=self._worker_id, failure=outbox.Failure.of(delivery.message.attempt, error) if error else None,
                )  # fmt: skip
                tell = await handler.on_buried(connection, delivery.message, reason) if buried and handler else None
        except SettledMeanwhile:
            buried, tell = False, None
        if not buried:
            self._tell_duplicate(delivery.message)
            return
        emit(WORKER, "DLQ_EVENT", eventId=delivery.message.id, reason=reason)
        if tell is not None:
            tell()

    async def _bury_undecodable(self, record: Record, error: Undecodable) -> None:
        reason = f"Undecodable: {error}"
        own = await ENDLESS.run(lambda: self._own(record))
        if own is None:
            await self._bury_foreign(record, uuid5(UNDECODABLE, repr(record.place)), reason, error, None)
        else:
            await ENDLESS.run(lambda: self._bury(Delivery(own, record.place, self._worker_id, 0), reason, error))

    async def _own(self, record: Record) -> Message | None:
        """The outbox row that the record was published from, byte for byte: PostgreSQL keeps JSON that no worker can read.

        Buried as a stranger's, its row would be published again by every turn of the janitor.
        """
        try:
            event_id = UUID((dict(record.headers).get("event-id") or b"").decode())
        except ValueError:
            return None
        message = await outbox.get(self._database, event_id)
        return message if message is not None and message.encode()[1] == record.value else None

    async def _bury_foreign(
        self, record: Record, event_id: UUID, reason: str, error: BaseException | None, message: Message | None
    ) -> None:
        headers = {name: (text or b"").decode("utf-8", "replace") for name, text in record.headers}

        async def bury() -> bool:
            async with self._database.transaction() as connection:
                return await dead_letters.bury_foreign(
                    connection, event_id, reason=reason, error=error, place=record.place, raw=record.value,
                    headers=headers, worker_id=self._worker_id, message=message,
                )  # fmt: skip

        if await ENDLESS.run(bury):
            emit(WORKER, "DLQ_EVENT", eventId=event_id, reason=reason)
        elif message is not None:
            self._tell_duplicate(message)

    async def close(self) -> None:
        """End the statements under way."""
        for batcher in (self._lookups, self._records, self._retries):
            await batcher.close()
