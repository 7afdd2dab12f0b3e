"""Faults of Kafka: restarts and stops, lost data, and what an administrator can do to a topic and its group."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.admin import DeleteGroupsRequest

from orderflow.embedded.kafka import ApacheKafka
from orderflow.engine.kafka import bounded
from orderflow.torture.grounds import NOBODY, Action, Grounds
from orderflow.torture.plan import Fault, Kind
from orderflow.torture.process_faults import VICTIM_POLL, send

ADMIN_TIMEOUT = 30.0
# The program's grace period, and a margin.
LEAVE_TIMEOUT = 15.0
MORE_PARTITIONS = 2
MOST_PARTITIONS = 30
JOIN_EVERY = 1.0
# Two or three events of an order; and an event for which there is no room.
LOW_LIMIT = 2_000
ABOVE_LIMIT = 10_000
# Before answers are lost: the program has connected again, and has sent something.
CONNECTED_AFTER = 3.0

_INSERT = """
INSERT INTO outbox (event_type, aggregate_type, aggregate_id, payload)
VALUES ('Oversized', 'torture', gen_random_uuid(), jsonb_build_object('text', repeat('x', $1))) RETURNING event_id
"""


class KafkaFaults:
    """`actions`: by kind. All but the rebalances need an Apache Kafka, and wait for each other."""

    def __init__(self, grounds: Grounds) -> None:
        self._grounds = grounds
        self._turn = asyncio.Lock()
        self.actions: Mapping[Kind, Action] = {
            Kind.KAFKA_RESTART: self._restart,
            Kind.KAFKA_KILL: self._kill,
            Kind.KAFKA_PAUSE: self._pause,
            Kind.KAFKA_WIPED: self._wipe,
            Kind.TOPIC_DELETED: self._delete_topic,
            Kind.PARTITIONS_ADDED: self._add_partitions,
            Kind.OFFSETS_TO_EARLIEST: lambda fault: self._without_members(lambda: self._reset(to_end=False)),
            Kind.OFFSETS_TO_LATEST: lambda fault: self._without_members(lambda: self._reset(to_end=True)),
            Kind.GROUP_DELETED: lambda fault: self._without_members(self._delete_group),
            Kind.LIMIT_LOWERED: self._lower_limit,
            Kind.ACKS_LOST: self._lose_answers,
            Kind.REBALANCES: self._rebalance,
        }

    def _kafka(self) -> ApacheKafka:
        assert self._grounds.kafka is not None
        return self._grounds.kafka

    async def _restart(self, fault: Fault) -> str:
        kafka = self._kafka()
        async with self._turn:
            await kafka.stop()
            return await self._back()

    async def _kill(self, fault: Fault) -> str:
        kafka = self._kafka()
        async with self._turn:
            await kafka.kill()
            return await self._back()

    async def _wipe(self, fault: Fault) -> str:
        kafka = self._kafka()
        async with self._turn:
            await kafka.wipe()
            return await self._back()

    async def _back(self) -> str:
        kafka = self._kafka()
        down = time.monotonic()
        await kafka.start()
        return f"back after {time.monotonic() - down:.1f} s"

    async def _pause(self, fault: Fault) -> str:
        kafka = self._kafka()
        async with self._turn:
            await kafka.pause()
            try:
                await asyncio.sleep(fault.lasts)
            finally:
                await kafka.resume()
        return f"pid {kafka.pid}"

    async def _delete_topic(self, fault: Fault) -> str:
        async def delete() -> str:
            async with self._admin() as admin:
                await admin.delete_topics([self._grounds.topic])
            return self._grounds.topic

        async with self._turn:
            return await _asked(delete())

    async def _add_partitions(self, fault: Fault) -> str:
        async with self._turn:
            return await _asked(self._more_partitions())

    async def _more_partitions(self) -> str:
        async with self._admin() as admin:
            count = len((await admin.describe_topics([self._grounds.topic]))[0]["partitions"])
            # After a deletion the topic may not be there; and every partition costs the broker a file.
            if not 0 < count <= MOST_PARTITIONS:
                return f"left at {count}"
            await admin.create_partitions({self._grounds.topic: NewPartitions(count + MORE_PARTITIONS)})
            return f"{count + MORE_PARTITIONS} of them"

    async def _lower_limit(self, fault: Fault) -> str:
        async with self._turn:
            told = await _asked(self._configure({"max.message.bytes": str(LOW_LIMIT)}))
            try:
                event_id = await self._grounds.ask(_INSERT, ABOVE_LIMIT)
                await asyncio.sleep(fault.lasts)
            finally:
                await _asked(self._configure({}))
        return f"{told}; event {event_id} is above it"

    async def _configure(self, own: dict[str, str]) -> str:
        """These settings for the topic, and no others of its own."""
        async with self._admin() as admin:
            await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, self._grounds.topic, own)])
        return ", ".join(f"{name} {value}" for name, value in own.items())

    async def _lose_answers(self, fault: Fault) -> str:
        detour = self._grounds.kafka_detour
        assert detour is not None
        async with self._turn:
            await asyncio.sleep(CONNECTED_AFTER)
            count = detour.mute()
            try:
                await asyncio.sleep(fault.lasts)
            finally:
                detour.unmute()
        return f"{count} connections, {detour.lost:,} bytes of answers"

    async def _without_members(self, act: Callable[[], Awaitable[str]]) -> str:
        """What Kafka allows with a group whose members have all left only: they leave, and their parent is held meanwhile."""
        victims = self._grounds.victims
        async with self._turn:
            if not send(victims.parent, signal.SIGSTOP):
                return NOBODY
            try:
                for victim in await victims.of("worker"):
                    send(victim.pid, signal.SIGTERM)
                end = time.monotonic() + LEAVE_TIMEOUT
                while time.monotonic() < end and await victims.of("worker"):  # noqa: ASYNC110  (their parent is held)
                    await asyncio.sleep(VICTIM_POLL)
                return await _asked(act())
            finally:
                send(victims.parent, signal.SIGCONT)

    async def _reset(self, *, to_end: bool) -> str:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._grounds.bootstrap, group_id=self._grounds.group, enable_auto_commit=False
        )
        try:
            await consumer.start()
            consumer.assign([TopicPartition(self._grounds.topic, at) for at in range(await self._partitions())])
            partitions = list(consumer.assignment())
            offsets = await (consumer.end_offsets if to_end else consumer.beginning_offsets)(partitions)
            if offsets:
                await consumer.commit(offsets)
        finally:
            await bounded(consumer.stop(), 5.0)
        return f"{len(offsets)} partitions"

    async def _delete_group(self) -> str:
        async with self._admin() as admin:
            coordinator = await admin.find_coordinator(self._grounds.group)
            # The library knows the request, and has no method for it.
            answer = await admin._send_request(DeleteGroupsRequest([self._grounds.group]), coordinator)
        return ", ".join(f"{name}: {for_code(code).__name__}" for name, code in answer.results)

    async def _partitions(self) -> int:
        async with self._admin() as admin:
            return len((await admin.describe_topics([self._grounds.topic]))[0]["partitions"])

    async def _rebalance(self, fault: Fault) -> str:
        """A member comes, and goes again, every second; it commits nothing."""
        end, joined = time.monotonic() + fault.lasts, 0
        while time.monotonic() < end:
            member = AIOKafkaConsumer(
                self._grounds.topic, bootstrap_servers=self._grounds.bootstrap, group_id=self._grounds.group,
                enable_auto_commit=False, session_timeout_ms=6_000,
            )  # fmt: skip
            try:
                with suppress(TimeoutError, KafkaError, OSError):
                    async with asyncio.timeout(JOIN_EVERY * 5):
                        await member.start()
                    joined += 1
                await asyncio.sleep(JOIN_EVERY)
            finally:
                await bounded(member.stop(), 5.0)
        return f"{joined} times"

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self._grounds.bootstrap)
        try:
            await admin.start()
            yield admin
        finally:
            await bounded(admin.close(), 2.0)


async def _asked(act: Awaitable[str]) -> str:
    """What was done; a Kafka that another fault has taken away, or a group with a member again, refuses, and that is all."""
    try:
        async with asyncio.timeout(ADMIN_TIMEOUT):
            return await act
    except (KafkaError, TimeoutError, OSError) as error:
        return f"refused: {type(error).__name__}"
