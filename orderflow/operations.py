"""What an operator's machines ask a process: /livez, /readyz, /metrics; beside the API, or in a process without it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

import orjson
from aiohttp import web

from orderflow.engine.telemetry import PROCESS, emit
from orderflow.health import Health
from orderflow.orders.problems import RETRY_AFTER_SECONDS, SERVER, Problem
from orderflow.orders.serving import Runner, listen

# The metrics as they are now, and their content type.
Metrics = Callable[[], tuple[bytes, str]]
# Before each answer of /readyz: bring the health up to date, in a moment and without an error.
Refresh = Callable[[], Awaitable[None]]

_HEADERS: Final = {"Content-Type": "application/json", "Cache-Control": "no-store", "Server": SERVER}


async def up_to_date() -> None:
    """The Refresh of a health that others keep."""


def add_operations(app: web.Application, health: Health, metrics: Metrics, refresh: Refresh = up_to_date) -> None:
    """Add the three routes to an application."""

    async def livez(request: web.Request) -> web.Response:
        return web.Response(body=b'{"status":"live"}', headers=_HEADERS)

    async def readyz(request: web.Request) -> web.Response:
        await refresh()
        return readiness(health)

    async def metrics_now(request: web.Request) -> web.Response:
        content, content_type = metrics()
        return web.Response(
            body=content,
            headers={"Content-Type": content_type, "Cache-Control": "no-store", "Server": SERVER},
        )

    for path, handler in (("/livez", livez), ("/readyz", readyz), ("/metrics", metrics_now)):
        app.router.add_get(path, handler)


def readiness(health: Health) -> web.Response:
    """200 with the snapshot, or 503 as a problem document with the dependencies, and the status as `state`."""
    snapshot = health.snapshot()
    if health.ready:
        return web.Response(body=orjson.dumps(snapshot, option=orjson.OPT_UTC_Z), headers=_HEADERS)
    state = snapshot.pop("status")
    return Problem(
        503,
        f"This process is {state}.",
        kind="not-ready",
        title="Not ready",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS), "Cache-Control": "no-store"},
        state=state,
        **snapshot,
    ).response("/readyz")


class Operations:
    """The service that answers these routes on a port of its own, for a process without the API."""

    name = "operations"

    def __init__(
        self, host: str, port: int, health: Health, metrics: Metrics, *, reuse_port: bool = False,
        tls: ssl.SSLContext | None = None, refresh: Refresh = up_to_date,
    ) -> None:  # fmt: skip
        self._host = host
        self._wanted = port
        self._health = health
        self._metrics = metrics
        # Processes of one parent share the port, and their metrics: each answers for all.
        self._reuse_port = reuse_port
        self._tls = tls
        self._refresh = refresh
        self.port = 0

    async def run(self, stopping: asyncio.Event) -> None:
        """Listen until `stopping` is set. Raises Misconfigured when it cannot."""
        app = web.Application()
        add_operations(app, self._health, self._metrics, self._refresh)
        runner = Runner(app, drain_seconds=1.0)
        try:
            await runner.setup()
            self.port = await listen(
                runner, self._host, self._wanted, reuse_port=self._reuse_port, port_setting="ORDERFLOW_METRICS_PORT",
                tls=self._tls,
            )  # fmt: skip
            scheme = "https" if self._tls else "http"
            emit(PROCESS, "STARTUP", message=f"health and metrics on {scheme}://{self._host}:{self.port}")
            await stopping.wait()
        finally:
            await runner.cleanup()
