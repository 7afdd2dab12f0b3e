"""The servers of one command: private ones, or those that were named; a fresh database and topic for each measured run."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from orderflow.embedded.broker import EmbeddedBroker
from orderflow.embedded.errors import EmbeddedError
from orderflow.embedded.kafka import VERSION, ApacheKafka, available, install
from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.engine.kafka import bounded
from orderflow.migrations import migrate

CONNECT_TIMEOUT = 10.0
COMMAND_TIMEOUT = 120.0
KAFKA_TIMEOUT_MS = 10_000
# What anyone gives a server that takes thousands of commits a second, and the references have it too: with the defaults, made
# for a machine of 128 MB, it would write a checkpoint every quarter of a minute.
TUNED = {"shared_buffers": "1GB", "max_wal_size": "8GB", "checkpoint_timeout": "15min"}


@dataclass(frozen=True, slots=True)
class Target:
    """A database with the schema and nothing in it, and a topic of its own."""

    database_url: str
    bootstrap: str
    topic: str
    embedded_broker: bool

    def environment(self) -> dict[str, str]:
        """The settings that lead a process of the program here."""
        return {
            "DATABASE_URL": self.database_url,
            "KAFKA_BOOTSTRAP_SERVERS": self.bootstrap,
            "ORDERFLOW_TOPIC": self.topic,
            "ORDERFLOW_CONSUMER_GROUP": f"{self.topic}-workers",
            "ORDERFLOW_KAFKA_EMBEDDED": str(self.embedded_broker).lower(),
        }


class Servers:
    """PostgreSQL and a broker, as an async context manager. Those that are not named are started below `directory`.

    The private PostgreSQL is durable: a commit that is waited for has been fsynced. An Apache Kafka that is not in the cache
    is fetched without a word: `fetch_kafka` comes first where people wait.
    """

    def __init__(
        self, directory: Path, *, database_url: str | None = None, bootstrap: str | None = None,
        embedded_broker: bool = False, detour: int | None = None,
    ) -> None:  # fmt: skip
        """`detour`: see ApacheKafka."""
        self._given_url = database_url
        self._given_bootstrap = bootstrap
        self.embedded_broker = embedded_broker
        self.postgres = None if database_url else EmbeddedPostgres(directory / "postgresql", port=None, settings=TUNED)
        self.kafka = None if bootstrap or embedded_broker else ApacheKafka(directory / "kafka", detour=detour)
        self.broker = EmbeddedBroker(directory / "broker") if embedded_broker else None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for server in (self.postgres, self.kafka, self.broker):
                if server is not None:
                    stack.push_async_callback(server.stop)
                    await server.start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def bootstrap(self) -> str:
        """host:port of the broker."""
        server = self.kafka or self.broker
        return server.bootstrap if server else str(self._given_bootstrap)

    @property
    def broker_name(self) -> str:
        """For people: which broker this run is about."""
        if self.broker is not None:
            return "embedded (librdkafka's mock: in memory, carries no durability claim)"
        return f"Apache Kafka {VERSION}" if self.kafka else f"at {self._given_bootstrap}"

    async def postgres_version(self) -> str:
        """As the server says it, with what matters of its settings."""
        async with self._administered() as admin:
            given = [f"{name} {await admin.fetchval(f'SHOW {name}')}" for name in TUNED]
            return f"{await admin.fetchval('SHOW server_version')} ({', '.join(given)})"

    @asynccontextmanager
    async def fresh(self) -> AsyncIterator[Target]:
        """A new database with the schema and a new topic; both are removed afterwards.

        A server that was named must let its user create databases; the database in its address is never written to.
        """
        name = f"orderflow_bench_{secrets.token_hex(6)}"
        async with self._administered() as admin:
            await self._create(admin, name)
        try:
            target = Target(self._url_of(name), self.bootstrap, name.replace("_", "-"), self.embedded_broker)
            await migrate(target.database_url)
            # What the last run left in memory must not be written during this one.
            async with self._administered() as admin:
                with suppress(asyncpg.InsufficientPrivilegeError):
                    await admin.execute("CHECKPOINT")
            yield target
        finally:
            # A connection of its own: the server may have been away meanwhile.
            async with self._administered() as admin:
                await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            await self._delete_topic(name.replace("_", "-"))

    async def _create(self, admin: asyncpg.Connection, name: str) -> None:
        try:
            await admin.execute(f"CREATE DATABASE {name}{' OWNER app_user' if self.postgres else ''}")
        except asyncpg.InsufficientPrivilegeError:
            raise EmbeddedError(
                "the user of --database-url may not create the scratch databases: ALTER ROLE ... CREATEDB, "
                "or leave the option out"
            ) from None

    def _url_of(self, database: str) -> str:
        if self.postgres is not None:
            return self.postgres.url_of(database)
        return urlunsplit(urlsplit(str(self._given_url))._replace(path=f"/{database}"))

    @asynccontextmanager
    async def _administered(self) -> AsyncIterator[asyncpg.Connection]:
        admin = await self._admin()
        try:
            yield admin
        finally:
            await admin.close(timeout=CONNECT_TIMEOUT)

    async def _admin(self) -> asyncpg.Connection:
        if self.postgres is not None:
            return await self.postgres.connect()
        return await asyncpg.connect(self._given_url, timeout=CONNECT_TIMEOUT, command_timeout=COMMAND_TIMEOUT)

    async def _delete_topic(self, topic: str) -> None:
        if self.embedded_broker:
            return
        from aiokafka.admin import AIOKafkaAdminClient
        from aiokafka.errors import KafkaError

        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap, request_timeout_ms=KAFKA_TIMEOUT_MS)
        try:
            with suppress(KafkaError, OSError, TimeoutError):
                await admin.start()
                await admin.delete_topics([topic])
        finally:
            await bounded(admin.close(), 2.0)


async def fetch_kafka(tell: Callable[[float, str], None]) -> None:
    """Fetch Apache Kafka unless it is in the cache; `tell` hears how much is there (0 to 1), and what.

    Raises EmbeddedError that names the way out where it cannot be run.
    """
    reason = available()
    if reason is not None:
        raise EmbeddedError(
            f"{reason}; or give --embedded-broker, a broker in memory that needs neither and carries no durability claim"
        )
    await install(tell=tell)
