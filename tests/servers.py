"""Which real servers the tests run against, and how they are started; the fixtures are in conftest.py.

ORDERFLOW_TEST_POSTGRES  18 (default, from the wheel), 16 (from the wheel) or 15 (the system's)
ORDERFLOW_TEST_BROKER    kafka or embedded; default: Apache Kafka when Java and Maven are there, else embedded
CI=true                  what is missing is a failure, and Apache Kafka is a must
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from orderflow.embedded.binaries import PostgresBinaries, system_binaries, wheel_binaries
from orderflow.embedded.broker import EmbeddedBroker
from orderflow.embedded.errors import EmbeddedError
from orderflow.embedded.kafka import VERSION, ApacheKafka, available, install
from orderflow.embedded.lock import alive
from orderflow.embedded.postgres import EmbeddedPostgres

TEMPLATE = "orderflow_template"
PARTITIONS = 4
ADMIN_TIMEOUT_MS = 20_000


_fetch_failure: str | None = None


class Broker(Protocol):
    """What a test may ask of either broker."""

    @property
    def bootstrap(self) -> str: ...


class BrokerChoice(NamedTuple):
    """Which broker the session uses; `warning` says why it is not Apache Kafka."""

    kind: Literal["kafka", "embedded"]
    warning: str | None


def under_ci() -> bool:
    """Whether a missing server must be a failure and never a skip."""
    return os.environ.get("CI", "").lower() in ("true", "1")


def postgres_major() -> int:
    """The PostgreSQL major version that this run is about."""
    value = os.environ.get("ORDERFLOW_TEST_POSTGRES", "18")
    if value not in ("15", "16", "18"):
        raise EmbeddedError(f"ORDERFLOW_TEST_POSTGRES is {value!r}: use 18, 16 or 15")
    return int(value)


def binaries_of(major: int) -> PostgresBinaries:
    """That PostgreSQL. Raises EmbeddedError when it is not on this machine."""
    if major in (16, 18):
        return wheel_binaries(major)
    found = system_binaries(major)
    if found is None:
        raise EmbeddedError(f"PostgreSQL {major} is not on this machine: apt install postgresql-{major}")
    return found


def choose_broker() -> BrokerChoice:
    """The broker by environment and by what is installed. Raises EmbeddedError when the wanted one is missing."""
    wanted = os.environ.get("ORDERFLOW_TEST_BROKER", "")
    if wanted not in ("", "kafka", "embedded"):
        raise EmbeddedError(f"ORDERFLOW_TEST_BROKER is {wanted!r}: use kafka or embedded")
    if wanted == "embedded":
        return BrokerChoice("embedded", "asked for by ORDERFLOW_TEST_BROKER")
    reason = available() or _fetch_failure
    if reason is None:
        return BrokerChoice("kafka", None)
    if wanted == "kafka" or under_ci():
        raise EmbeddedError(reason)
    return BrokerChoice("embedded", reason)


def report() -> list[str]:
    """The lines of the test run's header: which servers, and a warning when it is not the real broker."""
    try:
        choice = choose_broker()
    except EmbeddedError as error:
        return [f"orderflow: PostgreSQL {postgres_major()}, broker MISSING: {error}"]
    if choice.kind == "kafka":
        return [f"orderflow: PostgreSQL {postgres_major()}, Apache Kafka {VERSION}"]
    return [
        f"orderflow: PostgreSQL {postgres_major()}, librdkafka's mock broker",
        f"WARNING: not tested against Apache Kafka: {choice.warning}",
    ]


def fetch_kafka() -> str | None:
    """Bring Apache Kafka into the cache before the first test, whose time limit a download must not eat.

    When that fails (no network), the mock broker stands in and the reason is returned; where Apache Kafka is a must,
    raises EmbeddedError.
    """
    global _fetch_failure
    if choose_broker().kind == "kafka":
        try:
            asyncio.run(install())
        except EmbeddedError as error:
            _fetch_failure = str(error)
            choose_broker()
    return _fetch_failure


def is_gone(pid: int) -> bool:
    """Whether that process has ended; one that nobody has reaped yet has."""
    return not alive(pid)


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory that PostgreSQL's user can reach too (pytest's tmp_path is closed to others)."""
    directory = Path(tempfile.mkdtemp(prefix="orderflow-test-"))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make_postgres(directory: Path, major: int | None = None, **options: object) -> EmbeddedPostgres:
    """A PostgreSQL for tests in that directory: any free port, no fsync (a kill loses nothing, a power cut would)."""
    binaries = binaries_of(major or postgres_major())
    return EmbeddedPostgres(directory, port=None, binaries=binaries, durable=False, **options)  # type: ignore[arg-type]


@asynccontextmanager
async def running_postgres() -> AsyncIterator[EmbeddedPostgres]:
    """A private PostgreSQL, removed with its data afterwards even when the test killed it."""
    with scratch_directory() as directory:
        server = make_postgres(directory / "postgres")
        try:
            await server.start()
            yield server
        finally:
            await server.wipe()


def make_kafka(directory: Path, **options: object) -> ApacheKafka:
    """An Apache Kafka for tests in that directory: none runs for so long that Java's second compiler would pay."""
    return ApacheKafka(directory, java_options=("-XX:TieredStopAtLevel=1",), **options)  # type: ignore[arg-type]


@asynccontextmanager
async def running_kafka() -> AsyncIterator[ApacheKafka]:
    """A private Apache Kafka, removed with its data afterwards."""
    with scratch_directory() as directory:
        server = make_kafka(directory / "kafka")
        try:
            await server.start()
            yield server
        finally:
            await server.kill()


@asynccontextmanager
async def running_broker() -> AsyncIterator[Broker]:
    """The broker that `choose_broker` says."""
    if choose_broker().kind == "kafka":
        async with running_kafka() as kafka:
            yield kafka
    else:
        with scratch_directory() as directory:
            async with EmbeddedBroker(directory) as broker:
                yield broker


async def make_template(server: EmbeddedPostgres) -> None:
    """Create the database that has the schema, to be cloned for each test."""
    from orderflow.migrations import migrate

    admin = await asyncpg.connect(server.admin_url, timeout=10)
    try:
        await admin.execute(f"CREATE DATABASE {TEMPLATE} OWNER app_user")
    finally:
        await admin.close()
    await migrate(server.url_of(TEMPLATE))


@asynccontextmanager
async def cloned_database(server: EmbeddedPostgres, template: str = TEMPLATE) -> AsyncIterator[str]:
    """The address of a fresh clone of the template (`template1`: no schema), dropped whoever is still connected."""
    name = f"test_{uuid.uuid4().hex}"
    admin = await asyncpg.connect(server.admin_url, timeout=10)
    try:
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} OWNER app_user")
        try:
            yield server.url_of(name)
        finally:
            await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    finally:
        await admin.close()


@asynccontextmanager
async def created_topic(broker: Broker) -> AsyncIterator[str]:
    """A topic of its own with four partitions; on the mock broker it appears on first use."""
    name = f"test-{uuid.uuid4().hex}"
    if not isinstance(broker, ApacheKafka):
        yield name
        return
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap, request_timeout_ms=ADMIN_TIMEOUT_MS)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, PARTITIONS, 1)])
        yield name
        await admin.delete_topics([name])
    finally:
        await admin.close()
