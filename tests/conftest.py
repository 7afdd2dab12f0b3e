"""Fixtures: real servers, a database of its own for each test, a topic of its own for each test."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator

import asyncpg
import pytest
import pytest_asyncio

from orderflow.embedded.errors import EmbeddedError
from orderflow.embedded.kafka import ApacheKafka
from orderflow.embedded.postgres import EmbeddedPostgres
from tests import servers

# A shell starts what runs in the background with SIGINT ignored, nohup with SIGHUP: every program of a test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

NEED_KAFKA = {"kafka", "real_kafka", "restartable_kafka"}


def pytest_report_header() -> list[str]:
    """Say which servers this run is about, and warn when the broker is not the real one."""
    return servers.report()


def pytest_collection_finish(session: pytest.Session) -> None:
    """A download belongs to no test's time limit."""
    if session.config.option.collectonly:
        return
    if any(NEED_KAFKA & set(getattr(item, "fixturenames", ())) for item in session.items):
        try:
            failure = servers.fetch_kafka()
        except EmbeddedError as error:
            pytest.exit(str(error), returncode=pytest.ExitCode.TESTS_FAILED)
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if failure is not None and reporter is not None:
            reporter.write_line(f"WARNING: not tested against Apache Kafka: {failure}", yellow=True)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def postgres() -> AsyncIterator[EmbeddedPostgres]:
    """The session's PostgreSQL (see tests/servers.py for which one). Do not stop it: others use it."""
    async with servers.running_postgres() as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def migrated_postgres(postgres: EmbeddedPostgres) -> EmbeddedPostgres:
    """The same server with the template database that has the schema."""
    await servers.make_template(postgres)
    return postgres


@pytest_asyncio.fixture
async def database_url(migrated_postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """The address (role app_user) of a fresh database with the schema, dropped afterwards."""
    async with servers.cloned_database(migrated_postgres) as url:
        yield url


@pytest_asyncio.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection to the test's database."""
    opened = await asyncpg.connect(database_url, timeout=10, command_timeout=30)
    try:
        yield opened
    finally:
        await opened.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def kafka() -> AsyncIterator[servers.Broker]:
    """The session's broker: Apache Kafka, or librdkafka's mock where there is no Java. Do not stop it."""
    async with servers.running_broker() as broker:
        yield broker


@pytest_asyncio.fixture
async def topic(kafka: servers.Broker) -> AsyncIterator[str]:
    """A topic of its own with four partitions."""
    async with servers.created_topic(kafka) as name:
        yield name


@pytest_asyncio.fixture
async def restartable_postgres() -> AsyncIterator[EmbeddedPostgres]:
    """A PostgreSQL of its own, which the test may stop, kill, pause and restart; its app_db has the schema."""
    from orderflow.migrations import migrate

    async with servers.running_postgres() as server:
        await migrate(server.url)
        yield server


@pytest_asyncio.fixture
async def restartable_kafka() -> AsyncIterator[ApacheKafka]:
    """An Apache Kafka of its own, which the test may stop, kill, pause, restart and wipe."""
    choice = servers.choose_broker()
    if choice.kind != "kafka":
        pytest.skip(f"needs Apache Kafka: {choice.warning}")
    async with servers.running_kafka() as server:
        yield server
