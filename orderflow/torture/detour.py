"""A way to a server that can be made half-open, or deaf to its answers: bytes vanish, and neither side is told.

Half-open connections stay so. The server's side ends after `SERVER_NOTICES`, as its keepalive would end it; the client's
side stays open in silence until the client gives it up.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from orderflow.embedded import ports

SERVER_NOTICES = 10.0
CONNECT_TIMEOUT = 5.0
CHUNK = 65_536


class Detour:
    """Listens on a port of its own and passes every connection on to `to`, a port that may be known later only."""

    def __init__(self, to: int = 0) -> None:
        self.to = to
        # While answers vanish: how many bytes of them have.
        self.muted = False
        self.lost = 0
        self._server: asyncio.Server | None = None
        self._lines: set[_Line] = set()

    @property
    def port(self) -> int:
        """Where to connect instead."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, ports.HOST, 0)

    async def stop(self) -> None:
        """End every connection."""
        if self._server is not None:
            self._server.close()
        for line in list(self._lines):
            line.end()

    def swallow(self) -> int:
        """Make every connection that there is half-open; returns how many."""
        passing = [line for line in self._lines if not line.swallowing]
        for line in passing:
            line.swallow()
        return len(passing)

    def mute(self) -> int:
        """From this moment on requests pass, and answers vanish, also on a new connection; returns how many there are."""
        self.muted, self.lost = True, 0
        return len(self._lines)

    def unmute(self) -> None:
        """End every connection, as a network does that has lost a part of its stream; new ones pass everything."""
        self.muted = False
        for line in list(self._lines):
            line.end()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = _Line(self, reader, writer)
        self._lines.add(line)
        try:
            await line.run()
        finally:
            line.end()
            self._lines.discard(line)


class _Line:
    """One connection from a client, and ours to the server."""

    def __init__(self, detour: Detour, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._detour = detour
        self._client = (reader, writer)
        self._server: asyncio.StreamWriter | None = None
        self._notices: asyncio.TimerHandle | None = None
        self.swallowing = False

    async def run(self) -> None:
        """Until the client closes, or one side does while bytes still pass."""
        reader, writer = self._client
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_TIMEOUT):
                from_server, self._server = await asyncio.open_connection(ports.HOST, self._detour.to)
            back = asyncio.create_task(self._pass(from_server, writer, ends_client=True))
            try:
                await self._pass(reader, self._server)
            finally:
                back.cancel()
                await asyncio.gather(back, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, ends_client: bool = False) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                if ends_client and self._detour.muted:
                    self._detour.lost += len(data)
                elif not self.swallowing:
                    writer.write(data)
                    await writer.drain()
        if ends_client and not self.swallowing:
            self._client[1].transport.abort()

    def swallow(self) -> None:
        self.swallowing = True
        if self._server is not None:
            self._notices = asyncio.get_running_loop().call_later(SERVER_NOTICES, self._server.transport.abort)

    def end(self) -> None:
        if self._notices is not None:
            self._notices.cancel()
        for writer in (self._client[1], self._server):
            if writer is not None:
                writer.transport.abort()
