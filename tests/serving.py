"""The API as a test sees it: the real service on a real port, with what it needs around it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import aiohttp

from orderflow import listening
from orderflow.engine import telemetry
from orderflow.engine.handoff import Handoff
from orderflow.engine.postgres import Database
from orderflow.health import Health
from orderflow.orders.http import Api
from orderflow.settings import Settings
from tests.waiting import eventually

USER = UUID("3f0c8a52-6d1e-4b7f-9a43-0c5d2e8f7b61")
TIMEOUT = aiohttp.ClientTimeout(total=30)


@dataclass
class Answer:
    """An answer, read to its end; `body` is its JSON, or None without one."""

    status: int
    headers: Any
    raw: bytes
    body: Any


@dataclass
class Served:
    """A running API."""

    api: Api
    health: Health
    stopping: asyncio.Event
    running: asyncio.Task[None]
    session: aiohttp.ClientSession
    handoff: Handoff
    scheme: str = "http"
    facts: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.api.port}"

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        """Send one request and read the answer."""
        async with self.session.request(method, self.url + path, **options) as response:
            raw = await response.read()
            body = await response.json(content_type=None) if raw and "json" in response.headers["Content-Type"] else None
            return Answer(response.status, response.headers, raw, body)

    async def place(self, amount: Any = "10.00", *, key: str | None = None, user: UUID = USER) -> Answer:
        """POST /orders."""
        headers = {"Idempotency-Key": key} if key is not None else {}
        return await self.ask("POST", "/orders", json={"userId": str(user), "amount": amount}, headers=headers)

    async def send(self, raw: bytes, *, close: bool = False) -> bytes:
        """Send these bytes on a connection of their own; what comes back until the server closes, or nothing with `close`."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.api.port)
        try:
            writer.write(raw)
            await writer.drain()
            return b"" if close else await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def stop(self) -> None:
        """Ask the service to stop, and wait until it has."""
        self.stopping.set()
        await asyncio.wait_for(self.running, 20)


@asynccontextmanager
async def serving(url: str, **settings: Any) -> AsyncIterator[Served]:
    """The API on any free port, against the database at `url`."""
    given = {"http_port": 0, "database_pool_size": 4, "grace_seconds": 5.0, **settings}
    limits = Settings(_env_file=None, database_url=url, **given)
    health, stopping = Health(["api"]), asyncio.Event()
    handoff = Handoff()
    facts: list[tuple[str, str, dict[str, Any]]] = []

    async def open_database() -> Database:
        return await Database.open(url, size=limits.database_pool_size, timeout=limits.database_timeout_seconds)

    api = Api(
        limits,
        open_database,
        health,
        lambda: (b"up 1\n", "text/plain; version=0.0.4; charset=utf-8"),
        handoff,
        keys=listening.api_keys(limits),
        tls=listening.tls(limits),
    )
    scheme = "https" if limits.http_certificate_file else "http"
    with telemetry.subscribed(lambda service, event, told: facts.extend((service, event, fields) for fields in told)):
        running = asyncio.create_task(api.run(stopping))
        async with aiohttp.ClientSession(timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0)) as session:
            served = Served(api, health, stopping, running, session, handoff, scheme, facts)
            try:
                await eventually(lambda: health.status != "starting" or running.done(), what="the API starts")
                if running.done():
                    running.result()
                yield served
            finally:
                await served.stop()


class Wire:
    """A TCP relay in front of PostgreSQL that a test can cut, or make swallow every answer."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.cut = False
        self.mute = False
        self.swallowed = 0

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.hang_up()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    @property
    def url(self) -> str:
        """The database's address by way of this relay."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        credentials = self._target.netloc.rpartition("@")[0]
        return urlunsplit(self._target._replace(netloc=f"{credentials}@127.0.0.1:{port}"))

    def hang_up(self) -> None:
        """Break every connection there is."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.cut:
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection(self._target.hostname, self._target.port)
        self._writers |= {writer, back}
        self._pumps |= {
            asyncio.create_task(self._pump(reader, back, False)),
            asyncio.create_task(self._pump(there, writer, True)),
        }

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await source.read(65536):
                if answers and self.mute:
                    self.swallowed += len(chunk)
                    continue
                sink.write(chunk)
                await sink.drain()
        sink.close()
