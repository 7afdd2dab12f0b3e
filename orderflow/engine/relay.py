"""The relay: wake or poll -> fetch what is due, or take what is handed over -> produce -> mark what Kafka acknowledged.

Delivery is at least once: a crash between the acknowledgement and the mark publishes the row again, and the consumer decides.
Within an aggregate, order holds: one owner a shard, one round at a time, and nothing of an aggregate is marked after its first
event that failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime

from aiokafka import AIOKafkaProducer

from orderflow.engine import dead_letters, low_water, outbox
from orderflow.engine.handling import Burial, SettledMeanwhile
from orderflow.engine.handoff import Handoff
from orderflow.engine.kafka import Kafka, stop_producer
from orderflow.engine.low_water import Positions
from orderflow.engine.message import Message
from orderflow.engine.pace import Pace
from orderflow.engine.patience import DependencyUnavailable, within
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.publishing import UNPUBLISHABLE, Publishing
from orderflow.engine.seams import seam
from orderflow.engine.shards import Shards
from orderflow.engine.telemetry import PUBLISHER, emit, emit_each, observe
from orderflow.engine.wake import Wake
from orderflow.engine.watchdog import watched

# Events in a round, of all relays together, from which on it is worth to wait for more of them.
MANY = 32
# The watchdog's word for a backlog.
MOST_COUNTED = 1000


class Relay:
    """The publisher role. `poll` is the seconds after which a lost wake-up is noticed, `stall` those for which events may be
    due and none be published before the role is restarted: more than a server that is away takes for its error.
    """

    name = "publisher"

    def __init__(
        self, open_database: Callable[[], Awaitable[Database]], direct_url: str, kafka: Kafka, handoff: Handoff,
        *, burials: Mapping[str, Burial] | None = None, batch: int = 1000, poll: float = 1.0, heartbeat: float = 2.0,
        stall: float = 30.0, started: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._open_database = open_database
        self._direct_url = direct_url
        self._kafka = kafka
        self._handoff = handoff
        self._woken = handoff.woken
        self._burials = burials or {}
        self._batch = batch
        self._poll = poll
        self._heartbeat = heartbeat
        self._stall = stall
        self._started = started
        self._positions = Positions()
        # Groups that were acknowledged and marked, or buried.
        self._settled = 0

    async def run(self, stopping: asyncio.Event) -> None:
        """Publish until `stopping` is set; the round under way is finished and marked before the shards are given back."""
        database = await self._open_database()
        shards = Shards(self._direct_url)
        wake = asyncio.create_task(Wake(self._direct_url, self._woken, heartbeat=self._heartbeat).run())
        stop = asyncio.create_task(self._wake_on(stopping))
        producer: AIOKafkaProducer | None = None
        # Afresh: a run that failed has left rows unpublished behind the positions that it had reached.
        self._positions = Positions()
        try:
            await self._kafka.ensure_topic()
            producer = await self._kafka.producer(await self._kafka.largest_batch())
            emit(PUBLISHER, "STARTUP", message=f"publishing to {self._kafka.topic} at {self._kafka.bootstrap}")
            self._started()
            await watched(
                self._rounds(database, shards, producer, stopping), stopping, service=PUBLISHER, role=self.name,
                limit=self._stall, progress=lambda: self._settled, due=lambda: self._due(database, shards.owned),
            )  # fmt: skip
        finally:
            for task in (wake, stop):
                task.cancel()
            # Side by side: on a network that swallows bytes each waits for its limit.
            await asyncio.gather(asyncio.wait((wake, stop), timeout=2.0), shards.close())
            if producer is not None:
                await stop_producer(producer)
            await database.close()

    async def _wake_on(self, stopping: asyncio.Event) -> None:
        await stopping.wait()
        self._woken.set()

    async def _rounds(self, database: Database, shards: Shards, producer: AIOKafkaProducer, stopping: asyncio.Event) -> None:
        balanced_at = float("-inf")
        pace, published = Pace(), 0
        while not stopping.is_set():
            if time.monotonic() - balanced_at >= 1.0:
                await shards.balance()
                balanced_at = time.monotonic()
            # Neither where rounds are small because there is little to do, nor with a backlog, of which every round is full.
            relays = outbox.SHARDS / max(1, len(shards.owned))
            if published * relays >= MANY and published < self._batch // 2:
                await asyncio.sleep(pace.rest(relays))
            # Cleared before the look: what is committed during it sets the event again, and is not slept over.
            self._woken.clear()
            begun = time.monotonic()
            published = await self.run_once(database, shards.owned, producer)
            if published:
                pace.note(time.monotonic() - begun)
            elif not stopping.is_set():
                handed = await self._sleep(database, shards.owned)
                # Asked again: the session that holds the shards may have ended in its sleep, and another relay own them.
                if handed and len(shards.owned) == outbox.SHARDS:
                    async with database.acquire() as connection:
                        await self._publish(database, connection, handed, producer)

    @seam
    async def _due(self, database: Database, shards: Sequence[int]) -> str | None:
        async with database.acquire() as connection:
            count, seconds = await low_water.waiting(connection, shards, MOST_COUNTED)
        more = " or more" if count >= MOST_COUNTED else ""
        return f"{count}{more} events are due, the oldest for {seconds:.0f} s" if count else None

    @seam
    async def _sleep(self, database: Database, shards: Sequence[int]) -> Sequence[Message]:
        """Until woken, or the next poll, or the first retry that is due before it; returns what was handed over."""
        async with database.acquire() as connection:
            due_in = await outbox.next_due(connection, shards)
        seconds = self._poll if due_in is None else min(self._poll, max(0.001, due_in))
        with self._handoff.wanted(len(shards) == outbox.SHARDS) as handed, contextlib.suppress(TimeoutError):
            await within(self._woken.wait(), seconds)
        return handed

    @seam
    async def run_once(self, database: Database, shards: Sequence[int], producer: AIOKafkaProducer) -> int:
        """One round: fetch, produce, mark. Returns how many rows were due.

        Raises DependencyUnavailable when Kafka did not acknowledge in time; what it did acknowledge is marked before.
        """
        if not shards:
            return 0
        async with database.acquire() as connection:
            due = await self._positions.fetch(connection, shards, self._batch)
            if due.messages:
                await self._publish(database, connection, due.messages, producer)
            await self._positions.handled(connection, due)
        return len(due.messages)

    @seam
    async def _publish(
        self, database: Database, connection: Connection, due: Sequence[Message], producer: AIOKafkaProducer
    ) -> None:
        results, stuck = await Publishing(self._kafka, producer).send(due)
        acknowledged, refused, lost = _sort(due, results)
        if acknowledged:
            _tell(acknowledged)
            await outbox.mark_published_if_attempt(connection, acknowledged)
        for message, error in refused:
            await self._bury(database, message, error)
        if acknowledged or refused:
            self._settled += 1
        if lost is not None or stuck:
            # The outcome of a send that timed out is unknown, and its producer may be stuck for good (aiokafka #1017):
            # the role starts again with a fresh one, and publishes the unmarked rows again.
            reason = "a batch was refused" if lost is None else str(lost) or type(lost).__name__
            raise DependencyUnavailable(f"Kafka at {self._kafka.bootstrap} did not acknowledge: {reason}")

    @seam
    async def _bury(self, database: Database, message: Message, error: BaseException) -> None:
        failure = outbox.Failure.of(message.attempt, error)
        reason = f"Cannot be published: {error}"
        burial = self._burials.get(message.type)
        async with database.transaction() as connection:
            buried = await dead_letters.bury_if_attempt(
                connection, message, reason=reason, failure=failure, error=error, place=None, worker_id=None, published=False
            )
            if not buried:
                # A replay of what was processed long ago: left due, it would be refused again without an end.
                await outbox.withdraw_if_processed(connection, message)
            try:
                tell = await burial.on_buried(connection, message, reason) if buried and burial else None
            except SettledMeanwhile:
                # The order has ended by another event, or waits for an answer about its charge; this one can be published as
                # little as before.
                tell = None
        if buried:
            emit(PUBLISHER, "DLQ_EVENT", eventId=message.id, reason=reason)
        if tell is not None:
            tell()


def _sort(
    due: Sequence[Message], results: Sequence[BaseException | None]
) -> tuple[list[Message], list[tuple[Message, BaseException]], BaseException | None]:
    """Split a round into acknowledged, refused for good, and the first error that may pass."""
    acknowledged: list[Message] = []
    refused: list[tuple[Message, BaseException]] = []
    lost: BaseException | None = None
    held: set[object] = set()
    for message, error in zip(due, results, strict=True):
        if isinstance(error, UNPUBLISHABLE):
            refused.append((message, error))
        elif error is not None:
            lost = lost or error
            held.add(message.aggregate_id)
        elif message.aggregate_id not in held:
            # An event behind one that was lost stays unmarked: both are published again, in order.
            acknowledged.append(message)
    return acknowledged, refused, lost


def _tell(messages: Sequence[Message]) -> None:
    now = datetime.now(UTC)
    emit_each(
        PUBLISHER, "EVENT_PUBLISHED",
        [{"eventId": m.id, "eventType": m.type, "aggregateId": m.aggregate_id} for m in messages],
    )  # fmt: skip
    for message in messages:
        if message.attempt == 1:
            observe("published", (now - message.created_at).total_seconds())
