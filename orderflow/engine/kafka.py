"""Kafka clients with every default that loses data replaced, and every wait bounded."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    InvalidConfigurationError,
    InvalidPartitionsError,
    InvalidReplicationAssignmentError,
    InvalidReplicationFactorError,
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    PolicyViolationError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.metadata import MetadataRequest

from orderflow.engine.metadata import making_no_topic
from orderflow.engine.patience import DependencyUnavailable, Misconfigured, within
from orderflow.engine.seams import owning_seam, seam

R = TypeVar("R")

MAX_RECORD_BYTES = 1_000_000
MAX_BATCH_BYTES = 256 * 1024
# The least that a broker allows by default: it bounds how long a killed worker's partitions wait for their next owner.
SESSION_TIMEOUT_MS = 6_000
# The mock broker lets every rebalance last that long.
EMBEDDED_SESSION_TIMEOUT_MS = 2_000
JOIN_TIMEOUT_SECONDS = 15.0
DESCRIBE_PAUSE = 0.05
# How late a client learns of partitions that were added, or of a topic that is back, where no error tells it.
METADATA_AGE_MS = 5_000
# Why a topic is not created, when people have to mend it. Everything else passes, as a controller that moves.
REFUSALS = frozenset(
    error.errno
    for error in (
        InvalidTopicError, InvalidPartitionsError, InvalidReplicationFactorError, InvalidReplicationAssignmentError,
        InvalidConfigurationError, PolicyViolationError, TopicAuthorizationFailedError, ClusterAuthorizationFailedError,
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kafka:
    """Where the cluster is, how to speak to it, and the names of topic and group; `timeout` in seconds."""

    bootstrap: str
    topic: str = "order-events"
    group: str = "payment-worker"
    timeout: float = 10.0
    partitions: int = 12
    replication: int = -1
    # The mock broker of `dev`: it cannot create topics, and does not wake a waiting fetch when data arrives.
    embedded: bool = False
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str = "SCRAM-SHA-512"
    username: str | None = None
    password: str | None = None
    ca_file: str | None = None

    def options(self) -> dict[str, Any]:
        """What every aiokafka client of this cluster is made with.

        Raises Misconfigured when the authority's file cannot be used.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": [server.strip() for server in self.bootstrap.split(",")],
            "request_timeout_ms": int(self.timeout * 1000),
            "metadata_max_age_ms": METADATA_AGE_MS,
            "security_protocol": self.security_protocol,
        }
        if self.security_protocol.endswith("SSL"):
            try:
                options["ssl_context"] = ssl.create_default_context(cafile=self.ca_file)
            except OSError as error:
                raise Misconfigured(f"ORDERFLOW_KAFKA_CA_FILE: {self.ca_file} is not a PEM file to be read: {error}") from None
        if self.security_protocol.startswith("SASL"):
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.username,
                "sasl_plain_password": self.password,
            }
        return options

    @owning_seam
    async def producer(self, batch_bytes: int = MAX_BATCH_BYTES) -> AIOKafkaProducer:
        """A started idempotent producer that waits for all in-sync replicas; what is above `batch_bytes` is sent alone.

        Raises DependencyUnavailable when no broker answers in time.
        """
        producer = AIOKafkaProducer(
            **self.options(), client_id="orderflow-publisher", acks="all", enable_idempotence=True,
            max_batch_size=batch_bytes, max_request_size=MAX_RECORD_BYTES, retry_backoff_ms=50,
        )  # fmt: skip
        await self._start(producer.start(), producer.stop)
        return producer

    @owning_seam
    async def consumer(self, listener: ConsumerRebalanceListener, *, client_id: str) -> AIOKafkaConsumer:
        """A started consumer of the topic that commits nothing by itself and begins at the earliest record.

        Raises DependencyUnavailable when no broker answers in time.
        """
        session = EMBEDDED_SESSION_TIMEOUT_MS if self.embedded else SESSION_TIMEOUT_MS
        consumer = AIOKafkaConsumer(
            **self.options(), client_id=client_id, group_id=self.group, enable_auto_commit=False,
            auto_offset_reset="earliest", session_timeout_ms=session, heartbeat_interval_ms=session // 6,
            # A broker that does not wake a waiting fetch: 5 ms bound its round trip. A real one answers when data arrives, and
            # the same limit would only make it answer empty fetches.
            fetch_max_wait_ms=5 if self.embedded else 500, retry_backoff_ms=100,
            max_partition_fetch_bytes=1024 * 1024,
        )  # fmt: skip
        consumer.subscribe([self.topic], listener=listener)
        # Joining waits for the group: until the session of a member that was killed has ended, and the others have drained.
        await self._start(consumer.start(), consumer.stop, timeout=JOIN_TIMEOUT_SECONDS)
        return consumer

    @seam
    async def ensure_topic(self) -> int:
        """Create the topic when it is missing; returns its number of partitions.

        Raises DependencyUnavailable when no broker answers in time, Misconfigured when the cluster refuses the topic.
        """
        if self.embedded:
            return await self._partitions_on_first_use()
        admin = AIOKafkaAdminClient(**self.options(), client_id="orderflow-admin")
        await self._start(admin.start(), admin.close)
        try:
            async with asyncio.timeout(self.timeout):
                if self.topic not in await admin.list_topics():
                    topic = NewTopic(self.topic, self.partitions, 1)
                    # Set afterwards: the constructor refuses -1, which the protocol has for the broker's own default.
                    topic.replication_factor = self.replication
                    refuse_failed_creation(await admin.create_topics([topic]))
                while not (partitions := (await admin.describe_topics([self.topic]))[0]["partitions"]):  # noqa: ASYNC110
                    # Made, and not yet known to the broker that was asked: nobody tells when it is.
                    await asyncio.sleep(DESCRIBE_PAUSE)
                return len(partitions)
        except (KafkaError, TimeoutError, OSError) as error:
            raise self.unavailable(error) from error
        finally:
            await bounded(admin.close(), 2.0)

    @seam
    async def largest_batch(self) -> int:
        """Bytes of the largest batch that the topic takes, and MAX_BATCH_BYTES at the most; those too where nobody tells."""
        if self.embedded:
            return MAX_BATCH_BYTES
        try:
            told = await self._configured("max.message.bytes")
            return min(MAX_BATCH_BYTES, int(told["max.message.bytes"]))
        except (DependencyUnavailable, KeyError, ValueError):
            # Perhaps this user may not ask: a refused batch is divided all the same, in more time.
            return MAX_BATCH_BYTES

    @seam
    async def kept_for(self) -> timedelta | None:
        """The longest that the topic keeps a record; None: without an end.

        Raises DependencyUnavailable when no broker answers in time, or it does not tell.
        """
        try:
            told = await self._configured("cleanup.policy", "retention.ms", "segment.ms")
            if not told:
                # Nothing is kept of a topic that is made later, or was wiped.
                return timedelta(0)
            if "delete" not in told["cleanup.policy"] or int(told["retention.ms"]) < 0:
                return None
            # A segment is deleted as a whole, when its last record is old enough.
            return timedelta(milliseconds=int(told["retention.ms"]) + int(told["segment.ms"]))
        except OverflowError:
            return None
        except (KeyError, ValueError) as error:
            raise self.unavailable(error) from error

    @seam
    async def _configured(self, *names: str) -> dict[str, str]:
        """These settings of the topic; none of a topic that is not there."""
        admin = AIOKafkaAdminClient(**self.options(), client_id="orderflow-admin")
        await self._start(admin.start(), admin.close)
        try:
            topic = ConfigResource(ConfigResourceType.TOPIC, self.topic, dict.fromkeys(names))
            (answer,) = await within(admin.describe_configs([topic]), self.timeout)
            code, _, _, _, entries = answer.resources[0]
            if code == UnknownTopicOrPartitionError.errno:
                return {}
            if code:
                raise for_code(code)()
            return {name: value for name, value, *_ in entries}
        except (KafkaError, TimeoutError, OSError) as error:
            raise self.unavailable(error) from error
        finally:
            await bounded(admin.close(), 2.0)

    async def _partitions_on_first_use(self) -> int:
        producer = await self.producer()
        try:
            # The mock broker's only way to make one.
            request = MetadataRequest([self.topic], allow_auto_topic_creation=True)
            await within(producer.client.send(producer.client.get_random_node(), request), self.timeout)
            return len(await within(producer.partitions_for(self.topic), self.timeout))
        except (KafkaError, TimeoutError) as error:
            raise self.unavailable(error) from error
        finally:
            await stop_producer(producer)

    async def _start(
        self, start: Coroutine[Any, Any, None], stop: Callable[[], Coroutine[Any, Any, None]],
        *, timeout: float | None = None,
    ) -> None:  # fmt: skip
        try:
            with making_no_topic():
                await within(uncancelled(start), timeout or self.timeout)
        except BaseException as error:
            # A client whose start failed, or was given up, keeps sockets and tasks until it is stopped.
            await bounded(stop(), 2.0)
            if isinstance(error, (KafkaError, TimeoutError, OSError)):
                raise self.unavailable(error) from error
            raise

    def _how(self) -> str:
        """What else it may be where more than an address is needed: aiokafka tells its log alone."""
        if self.security_protocol == "PLAINTEXT":
            return ""
        return f" over {self.security_protocol} (a wrong authority, user or password look the same; LIBRARY_WARNING tells more)"

    def unavailable(self, error: BaseException) -> DependencyUnavailable:
        """The error in one line for people."""
        return DependencyUnavailable(
            f"Kafka at {self.bootstrap} cannot be reached{self._how()}: is it running, and is KAFKA_BOOTSTRAP_SERVERS right? "
            f"({type(error).__name__})"
        )


def refuse_failed_creation(response: Any) -> None:
    """Raise what the broker's answer to CreateTopics means, unless the topic is there.

    Misconfigured, or a KafkaError that passes.
    """
    for name, code, *rest in getattr(response, "topic_errors", ()):
        if code in (0, TopicAlreadyExistsError.errno):
            continue
        reason = rest[0] if rest and rest[0] else f"error {code}"
        # A factor above the number of brokers has the same code as brokers that have all just been restarted.
        if code in REFUSALS and "fenced" not in reason:
            raise Misconfigured(f"Kafka refuses to create topic {name!r}: {reason}; create it, or change ORDERFLOW_TOPIC_*")
        raise for_code(code)(reason)


async def uncancelled(work: Awaitable[R]) -> R:
    """The result of an aiokafka call, whose own cancellation, when it has lost its coordinator, becomes an error.

    Raises KafkaConnectionError; a cancellation that somebody asked for stays one.
    """
    try:
        return await work
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise KafkaConnectionError("the client has given up") from None


async def bounded(stopping: Coroutine[Any, Any, Any], timeout: float) -> bool:
    """Await a client's stop for at most `timeout` seconds; False where it hung (aiokafka #773) or failed.

    What it would still have done no longer matters: offsets and acknowledgements are settled before.
    """
    try:
        await within(uncancelled(stopping), timeout)
    except (TimeoutError, KafkaError, OSError, RuntimeError):
        return False
    return True


async def stop_producer(producer: AIOKafkaProducer, timeout: float = 2.0) -> None:
    """Flush for at most `timeout` seconds; what is not acknowledged by then is not sent any more."""
    if not await bounded(producer.stop(), timeout):
        # It flushes first, without an end where a topic has vanished: its sender would go on, beside the next one.
        await bounded(producer._sender.close(), timeout)
        await bounded(producer.client.close(), timeout)
