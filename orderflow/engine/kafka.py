"""Kafka clients with every default that loses data replaced, and every wait bounded."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaConnectionError, KafkaError, TopicAlreadyExistsError

from orderflow.engine.patience import DependencyUnavailable, Misconfigured, within

R = TypeVar("R")

MAX_RECORD_BYTES = 1_000_000
# The least that a broker allows by default: it bounds how long a killed worker's partitions wait for their next owner.
SESSION_TIMEOUT_MS = 6_000
# The mock broker lets every rebalance last that long.
EMBEDDED_SESSION_TIMEOUT_MS = 2_000
JOIN_TIMEOUT_SECONDS = 15.0


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
        """What every aiokafka client of this cluster is made with."""
        options: dict[str, Any] = {
            "bootstrap_servers": [server.strip() for server in self.bootstrap.split(",")],
            "request_timeout_ms": int(self.timeout * 1000),
            "security_protocol": self.security_protocol,
        }
        if self.security_protocol.endswith("SSL"):
            options["ssl_context"] = ssl.create_default_context(cafile=self.ca_file)
        if self.security_protocol.startswith("SASL"):
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.username,
                "sasl_plain_password": self.password,
            }
        return options

    async def producer(self) -> AIOKafkaProducer:
        """A started idempotent producer that waits for all in-sync replicas.

        Raises DependencyUnavailable when no broker answers in time.
        """
        producer = AIOKafkaProducer(
            **self.options(), client_id="orderflow-publisher", acks="all", enable_idempotence=True,
            max_batch_size=256 * 1024, max_request_size=MAX_RECORD_BYTES, retry_backoff_ms=50,
        )  # fmt: skip
        await self._start(producer.start(), producer.stop)
        return producer

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
                    refuse_failed_creation(self.topic, await admin.create_topics([topic]))
                described = await admin.describe_topics([self.topic])
                return max(1, len(described[0]["partitions"]))
        except (KafkaError, TimeoutError, OSError) as error:
            raise self.unavailable(error) from error
        finally:
            await bounded(admin.close(), 2.0)

    async def _partitions_on_first_use(self) -> int:
        producer = await self.producer()
        try:
            return len(await within(producer.partitions_for(self.topic), self.timeout))
        except (KafkaError, TimeoutError) as error:
            raise self.unavailable(error) from error
        finally:
            await bounded(producer.stop(), 2.0)

    async def _start(
        self, start: Coroutine[Any, Any, None], stop: Callable[[], Coroutine[Any, Any, None]],
        *, timeout: float | None = None,
    ) -> None:  # fmt: skip
        try:
            await within(uncancelled(start), timeout or self.timeout)
        except BaseException as error:
            # A client whose start failed, or was given up, keeps sockets and tasks until it is stopped.
            await bounded(stop(), 2.0)
            if isinstance(error, (KafkaError, TimeoutError, OSError)):
                raise self.unavailable(error) from error
            raise

    def unavailable(self, error: BaseException) -> DependencyUnavailable:
        """The error in one line for people."""
        return DependencyUnavailable(
            f"Kafka at {self.bootstrap} cannot be reached: is it running, and is KAFKA_BOOTSTRAP_SERVERS right? "
            f"({type(error).__name__})"
        )


def refuse_failed_creation(topic: str, response: Any) -> None:
    """Raise Misconfigured when the broker's answer to CreateTopics is an error other than 'exists already'."""
    for name, code, *rest in getattr(response, "topic_errors", ()):
        if code not in (0, TopicAlreadyExistsError.errno):
            reason = rest[0] if rest and rest[0] else f"error {code}"
            raise Misconfigured(f"Kafka refuses to create topic {name!r}: {reason}; create it, or change ORDERFLOW_TOPIC_*")


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
