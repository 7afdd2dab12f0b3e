"""The embedded broker: what aiokafka needs of it works, and what it is not is known."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from orderflow.embedded import broker as broker_module
from orderflow.embedded.broker import PARTITIONS, EmbeddedBroker
from orderflow.embedded.broker_main import start_through_the_library
from orderflow.embedded.errors import AlreadyRunningError, EmbeddedError, ServerDiedError
from tests.servers import is_gone


@pytest_asyncio.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    async with EmbeddedBroker(tmp_path / "broker") as server:
        yield server


@pytest.fixture
def topic() -> str:
    return f"test-{uuid.uuid4().hex}"


async def produce(bootstrap: str, topic: str, *values: bytes) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True)
    try:
        await producer.start()
        for value in values:
            await asyncio.wait_for(producer.send_and_wait(topic, value, key=value), 10)
    finally:
        await producer.stop()


async def consume(bootstrap: str, topic: str, group: str, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, group_id=group, auto_offset_reset="earliest",
        enable_auto_commit=False, fetch_max_wait_ms=5, session_timeout_ms=1500, heartbeat_interval_ms=300,
    )  # fmt: skip
    try:
        await consumer.start()
        async with asyncio.timeout(20):
            records = [await consumer.getone() for _ in range(count)]
        await consumer.commit()
        return sorted(record.value for record in records if record.value)
    finally:
        await consumer.stop()


async def test_an_idempotent_producer_and_a_group_that_commits(broker: EmbeddedBroker, topic: str) -> None:
    values = [str(number).encode() for number in range(20)]
    await produce(broker.bootstrap, topic, *values)
    assert await consume(broker.bootstrap, topic, "group", 20) == sorted(values)
    await produce(broker.bootstrap, topic, b"after")
    assert await consume(broker.bootstrap, topic, "group", 1) == [b"after"]


async def test_a_topic_appears_on_first_use_with_four_partitions(broker: EmbeddedBroker, topic: str) -> None:
    await produce(broker.bootstrap, topic, b"x")
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=broker.bootstrap)
    try:
        await consumer.start()
        assert consumer.partitions_for_topic(topic) == set(range(PARTITIONS))
        ends = await consumer.end_offsets([TopicPartition(topic, number) for number in range(PARTITIONS)])
        assert sum(ends.values()) == 1
    finally:
        await consumer.stop()


async def test_it_listens_on_the_loopback_and_forgets_everything(broker: EmbeddedBroker, topic: str) -> None:
    host, _, port = broker.bootstrap.rpartition(":")
    assert (host, port.isdigit()) == ("127.0.0.1", True)
    await produce(broker.bootstrap, topic, b"gone")
    await broker.stop()
    await broker.start()
    await produce(broker.bootstrap, topic, b"new")
    assert await consume(broker.bootstrap, topic, "group", 1) == [b"new"]


async def test_two_at_once(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async with EmbeddedBroker(tmp_path / "broker") as other:
        assert other.bootstrap != broker.bootstrap
        with pytest.raises(AlreadyRunningError):
            await other.start()


async def test_stop_kill_pause_and_wait(broker: EmbeddedBroker, topic: str) -> None:
    pid = broker.pid
    await broker.pause()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(produce(broker.bootstrap, topic, b"x"), 0.3)
    await broker.resume()
    await produce(broker.bootstrap, topic, b"x")
    await broker.kill()
    assert is_gone(pid)
    await broker.start()
    os.kill(broker.pid, signal.SIGKILL)
    assert await asyncio.wait_for(broker.wait(), 10) == -signal.SIGKILL
    assert not broker.running
    await broker.start()
    pid = broker.pid
    await broker.stop()
    assert is_gone(pid)
    await broker.stop()
    with pytest.raises(EmbeddedError, match=r"call start\(\) first"):
        await broker.pause()


async def test_one_that_cannot_start_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "main.py"
    broken.write_text("raise SystemExit('no broker today')")
    monkeypatch.setattr(broker_module, "MAIN", broken)
    with pytest.raises(ServerDiedError, match=r"exit code 1(.|\n)*no broker today"):
        await EmbeddedBroker(tmp_path).start()


async def test_a_wheel_that_keeps_the_library_elsewhere_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_through_the_library(tmp_path) is None
    other = tmp_path / "main.py"
    other.write_text(broker_module.MAIN.read_text().replace("librdkafka*", "nothing*"))
    monkeypatch.setattr(broker_module, "MAIN", other)
    async with EmbeddedBroker(tmp_path / "broker") as server:
        await produce(server.bootstrap, "topic", b"x")


async def test_without_the_wheel_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match="`pip install confluent-kafka`, or `make run`"):
        await EmbeddedBroker(tmp_path).start()
