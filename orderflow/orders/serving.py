"""Listening: aiohttp's server with its limits set, every error a problem document, a clear word on a bad port."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from orderflow.engine.patience import Misconfigured, within
from orderflow.orders.problems import Handle, Problem, with_problems

# Told of each answered request: method, pattern of the route, status.
Count = Callable[[str, str, int], None]

BACKLOG: Final = 1024
# Also how long a connection may take to send its request's head.
KEEPALIVE_SECONDS: Final = 75.0
# How long the rest of a refused body is read and thrown away, so that the caller gets to read why.
LINGER_SECONDS: Final = 2.0
MAX_BODY: Final = 65_536
# Of a process that is about to end: how long a connection on which nothing comes is kept for what may be on its way.
LEAVE_SECONDS: Final = 1.0


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
    nobody: asyncio.Event

    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self.nobody.clear()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        if not self.connections:
            self.nobody.set()


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
        self._leaving = False
        self._nobody = asyncio.Event()
        self._nobody.set()

    async def leave(self) -> None:
        """Accept no connection, end each with its next answer, and wait for those who keep theirs for a moment.

        Who has sent a request on a connection at the moment in which it is closed would have to guess what became of it.
        """
        self._leaving = True
        for site in list(self.sites):
            await site.stop()
        with contextlib.suppress(TimeoutError):
            await within(self._nobody.wait(), LEAVE_SECONDS)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        server = _Server(
            self._answering(with_problems(made.request_handler)), request_factory=made.request_factory, **self._kwargs
        )
        server.nobody = self._nobody
        return server

    def _answering(self, handle: Handle) -> Handle:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            response = await handle(request)
            # Never the path itself: each would be a time series for ever.
            resource = request.match_info.route.resource if isinstance(request, web.Request) else None
            self._count(request.method, resource.canonical if resource is not None else "unknown", response.status)
            if self._leaving:
                response.force_close()
            return response

        return answer


async def listen(
    runner: Runner, host: str, port: int, *, reuse_port: bool, port_setting: str,
    host_setting: str = "ORDERFLOW_HTTP_HOST", sockets: Sequence[int] = (), tls: ssl.SSLContext | None = None,
) -> int:  # fmt: skip
    """Start listening, or accepting from `sockets`, descriptors that listen already; returns the port.

    Raises Misconfigured, naming the setting, when the port is taken or forbidden or the address is not ours.
    """
    options: dict[str, Any] = {"reuse_port": True} if reuse_port else {}
    # Copies: the role may crash and start again in this process.
    sites: list[web.BaseSite] = [
        web.SockSite(runner, socket.socket(fileno=os.dup(one)), backlog=BACKLOG, ssl_context=tls) for one in sockets
    ]
    try:
        for site in sites or [web.TCPSite(runner, host, port, backlog=BACKLOG, ssl_context=tls, **options)]:
            await site.start()
    except OSError as error:
        for site in runner.sites:
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
