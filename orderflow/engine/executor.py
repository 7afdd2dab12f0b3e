"""One delivery as a pipeline of named steps: decode -> begin (or only look) -> handle -> settle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

from orderflow.engine import dead_letters, held, outbox, processed
from orderflow.engine.batcher import Batcher, Flush
from orderflow.engine.dead_letters import Place
from orderflow.engine.handling import Beginner, Delivery, Handler, InOrder, Record, SettledMeanwhile
from orderflow.engine.message import Message, Undecodable
from orderflow.engine.outcome import Dead, Done, Duplicate, Outcome, Postponed, Retry
from orderflow.engine.patience import ENDLESS
from orderflow.engine.postgres import Database
from orderflow.engine.processed import Known
from orderflow.engine.retry import Permanent, RetryPolicy
from orderflow.engine.seams import seam
from orderflow.engine.telemetry import WORKER, emit, emit_each, observe

# Seconds. What is tried again waits for longer than that anyway, comes one by one, and shares a statement for it.
LINGER = 0.02

_First = Batcher[Message, Known | None]
# Told the end of a delivery: None when it is settled, whatever came of it, or the error that leaves it unsettled.
Finished = Callable[[BaseException | None], None]


class Executor:
    """Runs deliveries; one instance a worker. Database outages are waited out: nothing that was begun is lost by them.

    Up to the handler, a delivery has no task of its own: it moves from group to group.
    """

    def __init__(
        self, database: Database, handlers: Mapping[str, Handler], policy: RetryPolicy, *,
        worker_id: str, subjects: Mapping[str, str] | None = None, batch: int = 500, in_flight: int = 4,
        random: Random | None = None,
    ) -> None:  # fmt: skip
        """`subjects`: see processed.record_statement; for event types without a handler. Their tables are also where it is
        looked up whether an event without a row has been retired.
        """
        self._database = database
        self._handlers = handlers
        self._policy = policy
        self._worker_id = worker_id
        self._random = random or Random()
        self._record = processed.record_statement(subjects or {})
        self._in_order = {kind for kind, handler in handlers.items() if isinstance(handler, InOrder) and handler.in_order}

        def grouped(flush: Flush[Any, Any], linger: float = 0.0) -> Batcher[Any, Any]:
            return Batcher(flush, size=batch, in_flight=in_flight, patience=ENDLESS, linger=linger)

        self._records: Batcher[Message, bool] = grouped(self._record_group)
        tables = set((subjects or {}).values())
        self._retired: Batcher[Message, bool] = grouped(lambda messages: processed.retired(database, tables, messages))
        self._retries: Batcher[outbox.Republish, bool] = grouped(lambda rs: outbox.republish_if_attempt(database, rs), LINGER)
        self._foreigns: Batcher[dead_letters.Foreign, bool] = grouped(
            lambda records: dead_letters.bury_foreign(database, records, worker_id)
        )
        # Two groups for a Beginner: what is tried for the first time does not wait for what is tried again.
        looked_up: _First = grouped(lambda messages: processed.look_up(database, messages))
        begun = {kind: handler for kind, handler in handlers.items() if isinstance(handler, Beginner)}
        self._begins: dict[str, _First] = {
            kind: grouped(begun[kind].begin) if kind in begun else looked_up for kind in handlers
        }
        self._resumes: dict[str, _First] = {
            kind: grouped(begun[kind].resume, LINGER) if kind in begun else looked_up for kind in handlers
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self._received: list[Message] = []

    async def execute(self, record: Record) -> None:
        """Take one record through all steps; returns when it is settled, whatever came of it."""
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def finished(error: BaseException | None) -> None:
            if not settled.done():
                settled.set_result(None) if error is None else settled.set_exception(error)

        self.start(record, finished)
        await settled

    def start(self, record: Record, finished: Finished) -> None:
        """Begin to take one record through all steps; `finished` is told its end, never before this returns."""
        try:
            message = Message.decode(record.value, record.headers)
        except Undecodable as error:
            self._run(self._bury_undecodable(record, error), finished)
            return
        if not self._received:
            asyncio.get_running_loop().call_soon(self._tell_received)
        self._received.append(message)
        handler = self._handlers.get(message.type)
        if handler is None:
            # What nobody handles is only recorded, and usually new: the record alone tells, without a look before it.
            def recorded(new: bool) -> None:
                finished(None) if new else self._run(self._judge_unrecorded(record, message), finished)

            self._records.hand_in(message, recorded, finished)
        else:
            chosen = handler

            def begun(known: Known | None) -> None:
                self._run(self._work(chosen, record, message, known), finished)

            steps = self._begins if message.attempt == 1 else self._resumes
            steps[message.type].hand_in(message, begun, finished)

    def _run(self, steps: Coroutine[Any, Any, None], finished: Finished) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                finished(task.exception())

        task = asyncio.create_task(steps)
        self._tasks.add(task)
        task.add_done_callback(ended)

    def _tell_received(self) -> None:
        received, self._received = self._received, []
        emit_each(WORKER, "EVENT_RECEIVED", [{"eventId": m.id, "eventType": m.type} for m in received])
        now = datetime.now(UTC)
        for message in received:
            if message.attempt == 1:
                observe("received", (now - message.created_at).total_seconds())

    @seam
    async def _record_group(self, messages: Sequence[Message]) -> list[bool]:
        results = await processed.record(self._database, self._record, messages, self._worker_id)
        emit_each(
            WORKER, "EVENT_PROCESSED",
            [{"eventId": m.id, "eventType": m.type} for m, new in zip(messages, results, strict=True) if new],
        )  # fmt: skip
        return results

    async def _judge_unrecorded(self, record: Record, message: Message) -> None:
        known = (await ENDLESS.run(lambda: processed.look_up(self._database, [message])))[0]
        delivery = await self._of_ours(record, message, known)
        if delivery is None:
            return
        if not delivery.known.is_fresh(message.attempt):
            await self._settle(delivery, Duplicate())
            return
        # Its outbox row may have been committed after the first look. If not, what it tells of does not exist.
        reason = f"Unknown {message.aggregate_type}: not in this database"
        if not await self._records.submit(message):
            await self._settle(delivery, Dead(reason, Permanent(reason)))

    @seam
    async def _work(self, handler: Handler, record: Record, message: Message, known: Known | None) -> None:
        delivery = await self._of_ours(record, message, known)
        if delivery is None:
            return
        if not delivery.known.is_fresh(message.attempt):
            await self._settle(delivery, Duplicate())
        elif delivery.known.held and message.type in self._in_order:
            await self._settle(delivery, held.behind(message))
        else:
            await self._settle(delivery, await self._handle(handler, delivery))

    async def _of_ours(self, record: Record, message: Message, known: Known | None) -> Delivery | None:
        """The delivery, or None for a record that is not what its outbox row tells of: that one is buried."""
        if known is None and await self._retired.submit(message):
            self._tell_duplicate(message)
        elif known is None:
            await self._bury_foreign(record, message.id, "Unknown event: no outbox row in this database", None, message)
        elif known.event_type != message.type or known.aggregate_id != message.aggregate_id:
            # Under an id of its own: buried under the event's, the forgery would take the true event with it.
            other = "aggregate" if known.aggregate_id != message.aggregate_id else "type"
            reason = f"Foreign event: its outbox row tells of another {other}"
            await self._bury_foreign(record, Place.of(record).event_id(), reason, None, message)
        else:
            return Delivery(message, record, known)
        return None

    @seam
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

    @seam
    async def _settle(self, delivery: Delivery, outcome: Outcome) -> None:
        message = delivery.message
        match outcome:
            case Done(recorded=recorded):
                if recorded:
                    emit(WORKER, "EVENT_PROCESSED", eventId=message.id, eventType=message.type)
                elif not await self._records.submit(message):
                    self._tell_duplicate(message)
                if message.attempt > 1 and message.type in self._in_order:
                    await ENDLESS.run(lambda: held.release(self._database, message.aggregate_id, message.id))
            case Duplicate():
                self._tell_duplicate(message)
            case Retry(delay=delay, error=error):
                if await self._again(message, delay, outbox.Failure.of(message.attempt, error)):
                    emit(
                        WORKER, "RETRY_SCHEDULED", eventId=message.id, retryCount=delivery.failures + 1,
                        maxRetries=self._policy.max_attempts, delayMs=round(delay.total_seconds() * 1000),
                    )  # fmt: skip
            case Postponed(delay=delay):
                if await self._again(message, delay, None):
                    emit(WORKER, "EVENT_POSTPONED", eventId=message.id, delayMs=round(delay.total_seconds() * 1000))
            case Dead(reason=reason, error=error):
                await ENDLESS.run(lambda: self._bury(delivery, reason, error))

    async def _again(self, message: Message, delay: timedelta, failure: outbox.Failure | None) -> bool:
        hold = message.type in self._in_order
        return await self._retries.submit(outbox.Republish(message.id, message.attempt, delay, failure, hold))

    def _tell_duplicate(self, message: Message) -> None:
        emit(WORKER, "DUPLICATE_EVENT", eventId=message.id, message="Event already processed, skipping")

    @seam
    async def _bury(self, delivery: Delivery, reason: str, error: BaseException | None) -> None:
        handler = self._handlers.get(delivery.message.type)
        try:
            async with self._database.transaction() as connection:
                buried = await dead_letters.bury_if_attempt(
                    connection, delivery.message, reason=reason, error=error, place=Place.of(delivery.record),
                    worker_id=self._worker_id, failure=outbox.Failure.of(delivery.message.attempt, error) if error else None,
                    hold=delivery.message.type in self._in_order,
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

    @seam
    async def _bury_undecodable(self, record: Record, error: Undecodable) -> None:
        reason = f"Undecodable: {error}"
        own = await ENDLESS.run(lambda: processed.source_of(self._database, record.value, record.headers))
        if own is None:
            await self._bury_foreign(record, Place.of(record).event_id(), reason, error, None)
        else:
            known = Known(own.type, own.aggregate_id, own.attempt, own.attempt, processed=False, buried=False)
            await ENDLESS.run(lambda: self._bury(Delivery(own, record, known), reason, error))

    @seam
    async def _bury_foreign(
        self, record: Record, event_id: UUID, reason: str, error: BaseException | None, message: Message | None
    ) -> None:
        headers = {name: (text or b"").decode("utf-8", "replace") for name, text in record.headers}
        foreign = dead_letters.Foreign(event_id, reason, Place.of(record), record.value, headers, error, message)
        if await self._foreigns.submit(foreign):
            emit(WORKER, "DLQ_EVENT", eventId=event_id, reason=reason)
        elif message is not None:
            self._tell_duplicate(message)

    async def close(self) -> None:
        """End what is at work, and the statements under way."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for first in {*self._begins.values(), *self._resumes.values()}:
            await first.close()
        await self._records.close()
        await self._retired.close()
        await self._retries.close()
        await self._foreigns.close()
