"""What `docker compose up` starts, without Docker: the same commands, environment and health check on servers of the test's."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest_asyncio

from orderflow.embedded.kafka import ApacheKafka
from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.settings import Settings
from tests import servers
from tests.deployment import SERVICES, command_of, copied_files, environment_of, final, health_check_of
from tests.fleet import Client, Process, api_of
from tests.waiting import eventually

START = 60.0


@pytest_asyncio.fixture
async def postgres() -> AsyncIterator[EmbeddedPostgres]:
    """A new one, with the database and the user that the file names and no schema."""
    async with servers.running_postgres() as server:
        yield server


@pytest_asyncio.fixture
async def kafka() -> AsyncIterator[servers.Broker]:
    """A new one, without the default topic."""
    async with servers.running_broker() as broker:
        yield broker


class Container:
    """What one service's container would run, here."""

    def __init__(self, service: str, addresses: dict[str, str], directory: Path, **changes: str) -> None:
        self.service = service
        self.directory = directory
        self.environment = {**{name: here(value, addresses) for name, value in environment_of(service).items()}, **changes}

    async def start(self) -> Process:
        """Start it."""
        return await Process.spawn(*command_of(self.service), environment=self.environment, directory=self.directory)

    async def is_healthy(self) -> bool:
        """Run its health check, once."""
        files = copied_files()
        command = [str(files.get(word, word)) for word in health_check_of(self.service)]
        return await (await Process.spawn(*command, environment=self.environment, directory=self.directory)).end() == 0


def here(value: str, addresses: dict[str, str]) -> str:
    """A variable's value with our programs and servers in the place of the container's."""
    for there, ours in addresses.items():
        value = value.replace(there, ours)
    return value


def published_port(service: str) -> int:
    """The port inside the container that the file publishes."""
    (mapping,) = SERVICES[service]["ports"]
    return int(mapping.rpartition(":")[2])


async def state_of(session: aiohttp.ClientSession, url: str) -> str:
    """The order's state as the API answers it, once that is terminal; empty before."""
    async with session.get(url) as response:
        state = (await response.json())["state"]
    return state if state in ("PAID", "FAILED") else ""


async def test_what_compose_starts_takes_an_order_to_its_end(
    postgres: EmbeddedPostgres, kafka: servers.Broker, tmp_path: Path, unused_tcp_port: int
) -> None:
    addresses = {
        "/opt/orderflow/bin": str(Path(sys.executable).parent), "$PATH": os.environ["PATH"],
        "@postgres:5432/": f"@127.0.0.1:{postgres.port}/", "kafka:19092": kafka.bootstrap,
    }  # fmt: skip
    migrate = Container("migrate", addresses, tmp_path)
    assert migrate.environment["DATABASE_URL"] == postgres.url
    changes = {} if isinstance(kafka, ApacheKafka) else {"ORDERFLOW_KAFKA_EMBEDDED": "true"}
    app = Container("app", addresses, tmp_path, HTTP_PORT=str(unused_tcp_port), **changes)
    # The one setting that is ours: where it is not set, the port is the one that the file publishes.
    assert "HTTP_PORT" not in environment_of("app")
    assert published_port("app") == Settings.model_fields["http_port"].default

    assert await (await migrate.start()).end(START) == 0
    assert not await app.is_healthy()
    process = await app.start()
    try:
        await eventually(app.is_healthy, START, what="the health check succeeds")
        assert (await api_of(process)).endswith(f":{unused_tcp_port}")
        client = Client()
        address = f"http://127.0.0.1:{unused_tcp_port}"
        await client.place_many(address, 5)
        async with aiohttp.ClientSession() as session:
            for order_id in client.accepted:
                await eventually(lambda url=f"{address}/orders/{order_id}": state_of(session, url), START)
        process.process.send_signal(signal.Signals[final("STOPSIGNAL")])
        assert await process.end(int(SERVICES["app"]["stop_grace_period"].removesuffix("s"))) == 0
    finally:
        if process.process.returncode is None:
            await process.close()
    assert (process.said, process.errors) == ([], [])
    assert not await app.is_healthy()
