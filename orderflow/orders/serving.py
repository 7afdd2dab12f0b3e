"""Listening: aiohttp's server with its limits set, every error a problem document, a clear word on a bad port."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from orderflow.engine.patience import Misconfigured
from orderflow.orders.problems import Handle, Problem, with_problems

# Told of each answered request: method, pattern of the route, status.
Count = Callable[[str, str, int], None]

BACKLOG: Final = 1024
# Also how long a connection may take to send its request's head.
KEEPALIVE_SECONDS: Final = 75.0
# How long the rest of a refused body is read and thrown away, so that the caller gets to read why.
LINGER_SECONDS: Final = 2.0
MAX_BODY: Final = 65_536


class _Protocol(RequestHandler):
    """aiohttp answers malformed HTTP with text, and logs a traceback that any stranger can cause."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already")
        detail = " ".join(message.split())[:200] if message and status < 500 else "The request could not be answered."
        return Problem(status, detail, close=True).response()


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Serves an application, every error as a problem document; `cleanup` waits `drain_seconds` for requests under way."""

    def __init__(
        self, app: web.Application, *, drain_seconds: float, count: Count = lambda method, route, status: None
    ) -> None:
        """`count` is told of each request that was answered: method, pattern of the route, status."""
        # aiohttp waits for its timeout twice: until requests end by themselves, and again after telling them to.
        super().__init__(
            app, handle_signals=False, shutdown_timeout=drain_seconds / 2, access_log=None,
            keepalive_timeout=KEEPALIVE_SECONDS, lingering_time=LINGER_SECONDS, auto_decompress=False,
        )  # fmt: skip
        self._count = count

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            _counted(with_problems(made.request_handler), self._count), request_factory=made.request_factory, **self._kwargs
        )


def _counted(handle: Handle, count: Count) -> Handle:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = await handle(request)
        # Never the path itself: each would be a time series for ever.
        resource = request.match_info.route.resource if isinstance(request, web.Request) else None
        count(request.method, resource.canonical if resource is not None else "unknown", response.status)
        return response

    return answer


async def listen(
    runner: Runner, host: str, port: int, *, reuse_port: bool, port_setting: str,
    host_setting: str = "ORDERFLOW_HTTP_HOST",
) -> int:  # fmt: skip
    """Start listening; returns the port, which the system has chosen where 0 was asked for.

    Raises Misconfigured, naming the setting, when the port is taken or forbidden or the address is not ours.
    """
    options: dict[str, Any] = {"reuse_port": True} if reuse_port else {}
    site = web.TCPSite(runner, host, port, backlog=BACKLOG, **options)
    try:
        await site.start()
    except OSError as error:
        await site.stop()
        raise _misconfigured(error, host, port, port_setting, host_setting) from error
    return int(runner.addresses[0][1])


def _misconfigured(error: OSError, host: str, port: int, port_setting: str, host_setting: str) -> Exception:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return Misconfigured(f"{host_setting}: {host!r} is not an address of this machine")
    if error.errno == errno.EADDRINUSE:
        return Misconfigured(f"{port_setting}: port {port} on {host} is in use: end what listens there, or choose another port")
    if error.errno == errno.EACCES:
        return Misconfigured(f"{port_setting}: this user may not listen on port {port}: choose one above 1023")
    return error
