"""Is Kafka reachable, and is the topic there, wide enough and kept up with?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from orderflow.commands.checks import LIMIT, Check, ok, problem, warning
from orderflow.engine.kafka import Kafka, bounded
from orderflow.engine.metadata import making_no_topic
from orderflow.engine.patience import Misconfigured, within
from orderflow.retention import refusal

ABOUT = "kafka"
# The number of a protocol request that a release of Apache Kafka was the first to answer.
_SIGNS = ((68, "3.7 or later"), (60, "2.8 or later"), (42, "2.4 or later"), (36, "1.0 or later"))
# Kafka 4.0 no longer answers the versions of a fetch before this one.
_FETCH, _FETCH_OF_4_0 = 1, 4
LAG_TOLERANCE = 10_000


@contextmanager
def _quiet() -> Iterator[None]:
    """aiokafka logs what it retries; here the result is what counts, and it is one line."""
    logger = logging.getLogger("aiokafka")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


async def check(kafka: Kafka, retention_days: int) -> list[Check]:
    """Everything about the cluster: brokers, topic, partitions, replication, retention, and the lag of the workers' group."""
    with _quiet():
        return await _check(kafka, retention_days)


async def _check(kafka: Kafka, retention_days: int) -> list[Check]:
    try:
        options = kafka.options() | {"request_timeout_ms": int(LIMIT * 1000)}
    except Misconfigured as error:
        return [problem(ABOUT, str(error), "correct ORDERFLOW_KAFKA_CA_FILE")]
    client = AIOKafkaClient(**options, client_id="orderflow-doctor")
    try:
        await within(client.bootstrap(), LIMIT)
        async with asyncio.timeout(LIMIT):
            checks = [await _brokers(kafka, client)]
            # With every topic: to ask for one by its name can create it.
            cluster = await client.fetch_all_metadata()
    except (KafkaError, OSError, TimeoutError) as error:
        return [_unreachable(kafka, error)]
    finally:
        await bounded(client.close(), 2.0)
    checks.extend(_topic(kafka, cluster))
    partitions = cluster.partitions_for_topic(kafka.topic)
    if partitions:
        checks.append(await _retention(kafka, retention_days))
        checks.append(await _lag(kafka, options, sorted(partitions)))
    return checks


def _unreachable(kafka: Kafka, error: BaseException) -> Check:
    return problem(
        ABOUT,
        f"{kafka.bootstrap} cannot be reached over {kafka.security_protocol}: {type(error).__name__}",
        "is it running, is KAFKA_BOOTSTRAP_SERVERS right, and do its advertised listeners lead back from here?",
    )


async def _brokers(kafka: Kafka, client: AIOKafkaClient) -> Check:
    brokers = client.cluster.brokers()
    where = f"{len(brokers)} broker{'s' if len(brokers) != 1 else ''} at {kafka.bootstrap}"
    if kafka.embedded:
        return ok(ABOUT, f"{where}: the embedded one, which forgets everything when it stops")
    return ok(ABOUT, f"{where}, {await _version(client)}")


async def _version(client: AIOKafkaClient) -> str:
    """The release by what the broker can answer: no request of the protocol asks for its name."""
    connection = await client._get_conn(client.get_random_node())
    answered: dict[int, tuple[int, int]] = getattr(connection, "_versions", {})
    if answered.get(_FETCH, (0, 0))[0] >= _FETCH_OF_4_0:
        return "Kafka 4.0 or later"
    return next((f"Kafka {release}" for key, release in _SIGNS if key in answered), "an old Kafka")


def _topic(kafka: Kafka, cluster: Any) -> list[Check]:
    partitions = cluster.partitions_for_topic(kafka.topic)
    if not partitions:
        return [warning(ABOUT, f"topic {kafka.topic} does not exist yet", "the first `orderflow run` creates it")]
    # The client knows each partition's replicas and has no method that tells them.
    known: dict[int, Any] = getattr(cluster, "_partitions", {}).get(kafka.topic, {})
    replicas = min((len(partition.replicas) for partition in known.values()), default=0)
    leaderless = [p for p in partitions if cluster.leader_for_partition(TopicPartition(kafka.topic, p)) in (None, -1)]
    seen = f"topic {kafka.topic}: {len(partitions)} partitions, {replicas} replicas"
    if leaderless:
        return [problem(ABOUT, f"{seen}, {len(leaderless)} without a leader", "bring their brokers back")]
    if kafka.embedded:
        return [ok(ABOUT, seen)]
    checks = []
    if len(partitions) == 1:
        checks.append(warning(ABOUT, f"{seen}: it keeps one worker busy", "kafka-topics.sh --alter --partitions 12"))
    if 0 < replicas < 2 and len(cluster.brokers()) > 1:
        checks.append(warning(ABOUT, f"{seen}: one broker's loss stops it", "replication factor 3, min.insync.replicas 2"))
    return checks or [ok(ABOUT, seen)]


async def _retention(kafka: Kafka, days: int) -> Check:
    if not days or kafka.embedded:
        return ok(ABOUT, "every event is kept")
    refused = await refusal(replace(kafka, timeout=LIMIT), days)
    if refused is None:
        return ok(ABOUT, f"events are kept for {days} days, longer than Kafka keeps its records")
    seen, _, advice = refused.partition(": ")
    return warning(ABOUT, f"nothing is deleted by retention: {seen}", advice)


async def _lag(kafka: Kafka, options: dict[str, Any], partitions: list[int]) -> Check:
    # Assigned by hand it joins no group: looking moves no partition away from a worker.
    consumer = AIOKafkaConsumer(**options, client_id="orderflow-doctor", group_id=kafka.group, enable_auto_commit=False)
    places = [TopicPartition(kafka.topic, partition) for partition in partitions]
    try:
        async with asyncio.timeout(LIMIT):
            with making_no_topic():
                await consumer.start()
            consumer.assign(places)
            ends = await consumer.end_offsets(places)
            begins = await consumer.beginning_offsets(places)
            committed = {place: await consumer.committed(place) for place in places}
    except (KafkaError, OSError, TimeoutError) as error:
        return warning(
            ABOUT,
            f"the lag of group {kafka.group} could not be read: {type(error).__name__}",
            "may this user read the group? (ACL: DESCRIBE on the group)",
        )
    finally:
        await bounded(consumer.stop(), 2.0)
    lag = sum(max(0, ends[p] - (begins[p] if committed[p] is None else committed[p])) for p in places)
    if all(offset is None for offset in committed.values()) and lag:
        return warning(ABOUT, f"group {kafka.group} has committed nothing, {lag} events wait", "is a worker running?")
    if lag > LAG_TOLERANCE:
        return warning(ABOUT, f"group {kafka.group} is {lag} events behind", "start more workers, up to the partitions")
    return ok(ABOUT, f"group {kafka.group} is {lag} events behind")
