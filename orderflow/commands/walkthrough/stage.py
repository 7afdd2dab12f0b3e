"""What the parts of the walk-through play on: servers, the program's processes, a database pool and an HTTP client."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import asyncpg

from orderflow.commands.environment import child_environment
from orderflow.commands.gateway import set_mode
from orderflow.commands.walkthrough import Missed
from orderflow.commands.walkthrough.programs import DEADLINE, Log, Program, until
from orderflow.engine.postgres import Database
from orderflow.migrations import migrate
from orderflow.settings import Settings, environment_name

TERMINAL = ("PAID", "FAILED")
# What the walk-through checks holds for the contract's gateway, whatever the environment says.
PINNED = ("gateway_delay_ms", "gateway_success_rate", "gateway_seed", "max_attempts")
HTTP_TIMEOUT = aiohttp.ClientTimeout(total=10.0)


def default(name: str) -> Any:
    """The default of a setting."""
    return Settings.model_fields[name].default


@dataclass
class Stage:
    """Everything that a part needs. `url` is known, and the processes run, after the first part."""

    database: Database
    http: aiohttp.ClientSession
    log: Log
    front: Program
    worker: Program
    private: bool
    began: datetime
    url: str = ""
    orders: list[UUID] = field(default_factory=list)

    async def place(self, amount: str) -> UUID:
        """POST an order, as a client would; its id. Raises Missed for any answer but a right 201."""
        document = {"userId": str(uuid4()), "amount": amount}
        async with self.http.post(f"{self.url}/orders", json=document) as response:
            body = await response.text()
            if response.status != 201:
                raise Missed(f"POST /orders answered {response.status}: {body[:200]}")
            answer = await response.json()
        order_id = UUID(answer["orderId"])
        if answer["state"] != "CREATED" or response.headers.get("Location") != f"/orders/{order_id}":
            raise Missed(f"POST /orders answered {answer}, Location {response.headers.get('Location')}")
        self.orders.append(order_id)
        return order_id

    async def get(self, order_id: UUID) -> dict[str, Any]:
        """GET the order."""
        async with self.http.get(f"{self.url}/orders/{order_id}") as response:
            if response.status != 200:
                raise Missed(f"GET /orders/{order_id} answered {response.status}")
            document: dict[str, Any] = await response.json()
            return document

    async def created_event(self, order_id: UUID) -> str:
        """The id of the order's OrderCreated event, as it stands in the log."""
        return str(
            await self.database.fetchval(
                "SELECT event_id FROM outbox WHERE aggregate_id = $1 AND event_type = 'OrderCreated'", order_id
            )
        )

    async def order(self, order_id: UUID) -> tuple[str, int]:
        """State and version of the order in the database."""
        row = await self.database.fetchrow("SELECT state, version FROM orders WHERE id = $1", order_id)
        if row is None:
            raise Missed(f"order {order_id} does not exist")
        return row["state"], row["version"]

    async def ended(self, order_id: UUID, *, timeout: float = DEADLINE) -> tuple[str, int]:
        """State and version of the order once it is terminal."""
        return await until(
            lambda: self.order(order_id), lambda now: now[0] in TERMINAL, f"order {order_id} ends", timeout=timeout
        )

    async def charges(self, order_id: UUID) -> int:
        """How many settled charges the gateway's ledger has for the order."""
        return int(
            await self.database.fetchval(
                "SELECT count(*) FROM gateway_charges WHERE reference = $1 AND status = 'settled'", order_id
            )
        )

    @asynccontextmanager
    async def gateway(self, mode: str) -> AsyncIterator[None]:
        """The simulated gateway in another mode, and back in `random` however the block ends."""
        await set_mode(self.database, mode)
        try:
            yield
        finally:
            await set_mode(self.database, "random")


@asynccontextmanager
async def prepared(settings: Settings, *, embedded: bool) -> AsyncIterator[Stage]:
    """A stage on servers of its own in a temporary directory, or on those that the settings name.

    Raises EmbeddedError, DependencyUnavailable or Misconfigured. Afterwards no process is left, and no directory.
    """
    async with AsyncExitStack() as stack:
        database_url, changes = settings.database_url, {"KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers}
        # A `.env` where the demo was started is meant for other servers than the demo's own.
        directory: Path | None = None
        if embedded:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orderflow-demo-")))
            database_url, changes = await _servers(stack, directory)
        await migrate(database_url)
        database = await Database.open(database_url, size=4, timeout=10.0, application="orderflow demo")
        stack.push_async_callback(database.close)
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=HTTP_TIMEOUT))
        environment = child_environment(
            changes
            | {
                "DATABASE_URL": database_url,
                "HTTP_PORT": "0",
                "ORDERFLOW_LOG_FORMAT": "json",
                "ORDERFLOW_METRICS_INTERVAL_SECONDS": "1",
                "ORDERFLOW_DEV_CHILDREN": "true",
            }
            | {environment_name(name): str(default(name)) for name in PINNED},
            inherit=not embedded,
        )
        log = Log()
        stage = Stage(
            database=database,
            http=http,
            log=log,
            front=Program(log, environment, "--role", "api", "--role", "publisher", directory=directory),
            worker=Program(log, environment, "--role", "worker", directory=directory),
            private=embedded,
            began=await database.fetchval("SELECT clock_timestamp()"),
        )
        stack.push_async_callback(_stop, stage)
        yield stage


async def _servers(stack: AsyncExitStack, directory: Path) -> tuple[str, dict[str, str]]:
    from orderflow.embedded.broker import EmbeddedBroker
    from orderflow.embedded.postgres import EmbeddedPostgres

    postgres = EmbeddedPostgres(directory / "postgresql", port=None)
    broker = EmbeddedBroker(directory / "broker")
    stack.push_async_callback(postgres.stop)
    stack.push_async_callback(broker.stop)
    await asyncio.gather(postgres.start(), broker.start())
    return postgres.url, {"KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap, "ORDERFLOW_KAFKA_EMBEDDED": "true"}


async def _stop(stage: Stage) -> None:
    await asyncio.gather(stage.front.stop(), stage.worker.stop())


async def counted(database: Database, query: str, *arguments: object) -> asyncpg.Record:
    """The one row of a statement that counts."""
    row = await database.fetchrow(query, *arguments)
    assert row is not None
    return row
