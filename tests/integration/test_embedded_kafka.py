"""Apache Kafka without Docker: the installation, and a server that may be killed, wiped and brought back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from orderflow.embedded import kafka_install, ports
from orderflow.embedded.errors import AlreadyRunningError, EmbeddedError, ServerDiedError
from orderflow.embedded.kafka import ApacheKafka, available, default_cache_dir, install
from tests.servers import Broker, choose_broker, fetch_kafka, is_gone, make_kafka, scratch_directory

ROOT = Path(__file__).parents[2]
TOPIC = "kept"


@pytest.fixture
def real_kafka() -> None:
    """Only where Apache Kafka can run."""
    choice = choose_broker()
    if choice.kind != "kafka":
        pytest.skip(f"needs Apache Kafka: {choice.warning}")


async def produce(server: ApacheKafka, value: bytes) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=server.bootstrap, acks="all", enable_idempotence=True)
    try:
        await producer.start()
        await asyncio.wait_for(producer.send_and_wait(TOPIC, value), 30)
    finally:
        await producer.stop()


async def first_value(server: ApacheKafka) -> bytes | None:
    consumer = AIOKafkaConsumer(TOPIC, bootstrap_servers=server.bootstrap, auto_offset_reset="earliest")
    try:
        await consumer.start()
        record = await asyncio.wait_for(consumer.getone(), 30)
        return record.value
    finally:
        await consumer.stop()


async def topics(server: ApacheKafka) -> list[str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=server.bootstrap)
    try:
        await admin.start()
        return list(await admin.list_topics())
    finally:
        await admin.close()


async def create_topic(server: ApacheKafka) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=server.bootstrap)
    try:
        await admin.start()
        await admin.create_topics([NewTopic(TOPIC, 4, 1)])
    finally:
        await admin.close()


async def test_messages_survive_a_restart_and_a_kill_and_not_a_wipe(restartable_kafka: ApacheKafka) -> None:
    server = restartable_kafka
    address = server.bootstrap
    await create_topic(server)
    await produce(server, b"first")
    await server.restart()
    assert await first_value(server) == b"first"
    await server.kill()
    assert not server.running
    await server.start()
    assert await first_value(server) == b"first"
    await server.wipe()
    await server.start()
    assert await topics(server) == []
    assert server.bootstrap == address


async def test_pause_resume_and_a_second_start_in_the_same_place(restartable_kafka: ApacheKafka) -> None:
    server = restartable_kafka
    with pytest.raises(AlreadyRunningError, match=f"already running here, pid {server.pid}"):
        await ApacheKafka(server.data_dir).start()
    await server.pause()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(topics(server), 0.5)
    await server.resume()
    assert await asyncio.wait_for(topics(server), 30) == []


@pytest.mark.usefixtures("real_kafka")
async def test_it_listens_on_the_loopback_only(kafka: Broker) -> None:
    assert isinstance(kafka, ApacheKafka)
    properties = (kafka.data_dir / "server.properties").read_text()
    addresses = [line for line in properties.splitlines() if "listeners=" in line]
    assert addresses
    assert all(address.startswith(("PLAINTEXT://127.0.0.1:", "CONTROLLER://127.0.0.1:"))
               for line in addresses for address in line.partition("=")[2].split(","))  # fmt: skip


@pytest.mark.usefixtures("real_kafka")
async def test_properties_and_a_path_with_umlauts_reach_the_server() -> None:
    with scratch_directory() as directory:
        server = make_kafka(directory / "kåfka \u20ac", heap="256m", properties={"num.partitions": 7})
        async with server:
            producer = AIOKafkaProducer(bootstrap_servers=server.bootstrap)
            await producer.start()
            await producer.send_and_wait("new", b"x")
            assert len(await producer.partitions_for("new")) == 7
            await producer.stop()
        assert (directory / "kåfka \u20ac" / "data" / "new-0").is_dir()


@pytest.mark.usefixtures("real_kafka")
async def test_one_that_dies_at_start_shows_why() -> None:
    with scratch_directory() as directory:
        server = ApacheKafka(directory, properties={"num.partitions": "many"})
        with pytest.raises(ServerDiedError, match=r"exit code 1(.|\n)*num\.partitions"):
            await server.start()
        assert not server.running


@pytest.mark.usefixtures("real_kafka")
async def test_in_the_foreground_until_ctrl_c() -> None:
    port = ports.free_port()
    with scratch_directory() as directory:
        process = subprocess.Popen(
            [sys.executable, "-m", "orderflow.embedded.kafka", "--port", str(port), "--data", str(directory)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert process.stdout is not None
        with process, process.stdout:
            try:
                line = await asyncio.to_thread(process.stdout.readline)
                assert f"127.0.0.1:{port}" in line
                owner, server = map(int, (directory / "lock").read_text().split())
                assert owner == process.pid
                process.send_signal(signal.SIGINT)
                assert await asyncio.to_thread(process.wait, 30) == 0
                assert is_gone(server)
            finally:
                process.kill()


# The installation, with a Maven that copies from the cache instead of downloading.

MAVEN = """#!{python}
import json, os, shutil, sys, time
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if os.path.exists({broken!r}):
    print("[ERROR] the network is down", file=sys.stderr)
    sys.exit(1)
output = next(word.partition("=")[2] for word in sys.argv if word.startswith("-DoutputDirectory="))
shutil.copytree({libs!r}, output)
"""


class FakeMaven:
    """An `mvn` on PATH; counts its calls and fails while it is broken."""

    def __init__(self, directory: Path, libs: Path) -> None:
        self._calls, self.broken = directory / "calls", directory / "broken"
        self._calls.touch()
        self.bin = directory / "bin"
        self.bin.mkdir()
        program = self.bin / "mvn"
        program.write_text(MAVEN.format(python=sys.executable, calls=str(self._calls), broken=str(self.broken), libs=str(libs)))
        program.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self._calls.read_text().splitlines()]


@pytest.fixture
async def maven(real_kafka: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMaven:
    await asyncio.to_thread(fetch_kafka)
    libs = default_cache_dir() / f"kafka-{kafka_install.VERSION}" / "install" / kafka_install.CLASS_PATH
    fake = FakeMaven(tmp_path, libs)
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    return fake


async def test_it_is_fetched_once_by_however_many_at_once(maven: FakeMaven, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = await asyncio.gather(install(cache), install(cache))
    assert first == second
    await install(cache)
    assert len(maven.calls) == 1
    assert "--strict-checksums" in maven.calls[0]
    assert sorted(path.name for path in (cache / f"kafka-{kafka_install.VERSION}").iterdir()) == [
        "install", "install.log", "lock",
    ]  # fmt: skip


async def test_a_download_tells_how_much_of_it_is_there(
    maven: FakeMaven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "cache" / f"kafka-{kafka_install.VERSION}" / "repository" / "org"
    repository.mkdir(parents=True)
    # As an interrupted download leaves it.
    (repository / "kafka.jar").write_bytes(bytes(kafka_install.REPOSITORY_BYTES // 2))
    told: list[tuple[float, str]] = []
    await install(tmp_path / "cache", lambda done, text: told.append((done, text)))
    assert told[0] == (0.5, "26.5 of about 53 MB")
    known = len(told)
    await install(tmp_path / "cache", lambda done, text: told.append((done, text)))
    assert len(told) == known


async def test_an_interrupted_installation_is_repaired(maven: FakeMaven, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    home = cache / f"kafka-{kafka_install.VERSION}"
    for half in ("partial", "install"):
        (home / half / "libs").mkdir(parents=True)
    installed = await install(cache)
    assert len(list((installed.directory / "libs").glob("kafka_*.jar"))) == 1
    assert not (home / "partial").exists()


async def test_a_failed_download_says_so_and_can_be_repeated(maven: FakeMaven, tmp_path: Path) -> None:
    maven.broken.touch()
    with pytest.raises(EmbeddedError, match=r"Maven failed(.|\n)*the network is down"):
        await install(tmp_path / "cache")
    maven.broken.unlink()
    await install(tmp_path / "cache")
    assert len(maven.calls) == 2


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ('openjdk version "11.0.2" 2019-01-15', "is Java 11: install a newer one"),
        ('java version "1.8.0_301"', "is Java 8: install a newer one"),
        ("Unable to locate a Java Runtime.", "names no version"),
        (None, "there is no java on PATH"),
    ],
)
async def test_java_that_is_missing_or_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str | None, reason: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    if says is not None:
        (tmp_path / "java").write_text(f"#!/bin/sh\necho '{says}' >&2\n")
        (tmp_path / "java").chmod(0o755)
    assert reason in (available(tmp_path) or "")
    with pytest.raises(EmbeddedError, match=reason):
        await install(tmp_path)


async def test_maven_is_needed_only_until_kafka_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "java").write_text("#!/bin/sh\necho 'openjdk version \"21.0.1\"' >&2\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert "there is no mvn on PATH" in (available(tmp_path) or "")
    formatted = tmp_path / f"kafka-{kafka_install.VERSION}" / "install" / "formatted"
    formatted.mkdir(parents=True)
    (formatted / "bootstrap.checkpoint").touch()
    assert available(tmp_path) is None
