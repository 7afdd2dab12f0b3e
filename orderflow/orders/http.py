"""The API as an application and as a service of the process."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable

import asyncpg
from aiohttp import web

from orderflow.engine.handoff import Handoff
from orderflow.engine.patience import is_transient
from orderflow.engine.postgres import Database
from orderflow.engine.telemetry import API, emit
from orderflow.health import POSTGRES, Health
from orderflow.operations import Metrics, Refresh, add_operations, up_to_date
from orderflow.orders.admission import Admission
from orderflow.orders.api_keys import ApiKeys
from orderflow.orders.openapi import document
from orderflow.orders.problems import SERVER
from orderflow.orders.routes import OrderRoutes
from orderflow.orders.service import OrderService
from orderflow.orders.serving import MAX_BODY, Count, Runner, listen
from orderflow.settings import Settings

PROBE_SECONDS = 2.0
# Kept of the grace period for closing the database after the last request.
RESERVED_SECONDS = 2.5


def build_app(
    service: OrderService, database: Database, health: Health, metrics: Metrics, keys: ApiKeys, *, request_timeout: float,
    refresh: Refresh = up_to_date,
) -> web.Application:  # fmt: skip
    """The whole API as an aiohttp application; the caller opens and closes what it is built from."""
    app = web.Application(client_max_size=MAX_BODY)
    routes = OrderRoutes(
        service, database, keys, request_timeout=request_timeout,
        database_failed=lambda error: health.set(POSTGRES, False, described(error)),
    )  # fmt: skip
    routes.add_to(app)
    add_operations(app, health, metrics, refresh)
    content = document(keys=bool(keys))

    async def openapi(request: web.Request) -> web.Response:
        return web.Response(body=content, headers={"Content-Type": "application/json", "Server": SERVER})

    app.router.add_get("/openapi.json", openapi)
    return app


def build_service(database: Database, settings: Settings, handoff: Handoff, admission: Admission) -> OrderService:
    """The order service with the limits of the settings."""
    return OrderService(
        database, batch_size=settings.batch_size, batches_in_flight=settings.batches_in_flight,
        queue=settings.http_queue, timeout=settings.http_request_timeout_seconds, handoff=handoff,
        admission=admission,
    )  # fmt: skip


class Api:
    """The role `api`: serves until it is told to stop, then finishes the requests under way.

    `open_database` opens a Database of its own; `handoff` is told of each commit. `port` is the real port once the
    role has started; 0 before. `keys` are asked for at /orders, `tls` is spoken where it is given.
    """

    name = "api"

    def __init__(
        self, settings: Settings, open_database: Callable[[], Awaitable[Database]], health: Health,
        metrics: Metrics, handoff: Handoff, count: Count = lambda method, route, status: None,
        keys: ApiKeys | None = None, tls: ssl.SSLContext | None = None, refresh: Refresh = up_to_date,
    ) -> None:  # fmt: skip
        self._keys = keys or ApiKeys("")
        self._tls = tls
        self._refresh = refresh
        self._count = count
        self._settings = settings
        self._open_database = open_database
        self._health = health
        self._metrics = metrics
        self._handoff = handoff
        self.admission = Admission(settings.max_backlog_age_seconds)
        self.port = 0

    async def run(self, stopping: asyncio.Event) -> None:
        """Serve until `stopping` is set. Raises Misconfigured when the port cannot be had."""
        settings = self._settings
        database = await self._open_database()
        service = build_service(database, settings, self._handoff, self.admission)
        app = build_app(
            service,
            database,
            self._health,
            self._metrics,
            self._keys,
            request_timeout=settings.http_request_timeout_seconds,
            refresh=self._refresh,
        )
        drain_seconds = max(0.2, settings.grace_seconds - RESERVED_SECONDS)
        runner = Runner(app, drain_seconds=drain_seconds, count=self._count)
        probe = asyncio.create_task(watch_database(database, service, self._health))
        watch = asyncio.create_task(self.admission.run(database))
        try:
            await runner.setup()
            # After a crash the same port again, also where the system chose it: callers hold its number.
            self.port = await listen(
                runner, settings.http_host, settings.http_port or self.port,
                reuse_port=settings.http_reuse_port, port_setting="HTTP_PORT", sockets=settings.listening, tls=self._tls,
            )  # fmt: skip
            self._health.set(POSTGRES, True)
            self._health.started(self.name)
            scheme = "https" if self._tls else "http"
            emit(API, "STARTUP", message=f"listening on {scheme}://{settings.http_host}:{self.port}")
            await _until(stopping, probe, watch)
            self._health.draining = True
        finally:
            probe.cancel()
            watch.cancel()
            await runner.leave()
            await runner.cleanup()
            await service.close()
            await database.close()


async def _until(stopping: asyncio.Event, *watching: asyncio.Task[None]) -> None:
    """Until it is set. Raises what ends one of those who watch: they go on for ever."""
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({stop, *watching}, return_when=asyncio.FIRST_COMPLETED)
        for task in watching:
            if task.done():
                task.result()
    finally:
        stop.cancel()


async def watch_database(database: Database, service: OrderService, health: Health, every: float = PROBE_SECONDS) -> None:
    """Keep the health's view of PostgreSQL up to date; asks only where no commit has shown it lately."""
    loop = asyncio.get_running_loop()
    while True:
        if loop.time() - service.last_commit < every:
            health.set(POSTGRES, True)
        else:
            await _probe(database, health, every)
        await asyncio.sleep(every)


async def _probe(database: Database, health: Health, patience: float) -> None:
    question = asyncio.create_task(database.fetchval("SELECT 1"))
    try:
        done, _ = await asyncio.wait({question}, timeout=patience)
        if not done:
            # Ended by the pool's own time limits; readiness must not wait for those.
            health.set(POSTGRES, False, described(TimeoutError()))
        await question
    except Exception as error:
        if not is_transient(error) and not isinstance(error, asyncpg.PostgresError):
            raise
        health.set(POSTGRES, False, described(error))
    else:
        health.set(POSTGRES, True)
    finally:
        if not question.done():
            question.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await question


def described(error: BaseException) -> str:
    """Why PostgreSQL is down, for /readyz: anyone may read that, so no address and no word of the server's."""
    match error:
        case TimeoutError():
            return "does not answer"
        case asyncpg.PostgresError():
            return f"refuses: {type(error).__name__}"
        case OSError():
            return "cannot be reached"
        case _:
            return f"fails: {type(error).__name__}"
