"""HTTP/1.1 over one kept-alive connection, as cheap as Python allows: the load generator shares the cores it measures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

ORDER_ID_LENGTH = 36
_LOCATION = b"/orders/"
REPLAYED = b"idempotency-replayed: true"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the API listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A response; `head` is the status line and the headers, in lower case."""

    status: int
    head: bytes
    body: bytes = field(repr=False)

    @property
    def order_id(self) -> str:
        """The id in the Location header of a 201; empty where there is none."""
        at = self.head.find(b"location: " + _LOCATION)
        if at < 0:
            return ""
        at += len(b"location: ") + len(_LOCATION)
        return self.head[at : at + ORDER_ID_LENGTH].decode("ascii", "replace")


class Exchange(asyncio.Protocol):
    """One connection, on which one request is under way at a time. `ended` is told the answer, or None when it was lost."""

    def __init__(self, ended: Callable[[Exchange, Answer | None], None]) -> None:
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._received = b""

    @classmethod
    async def open(cls, address: Address, ended: Callable[[Exchange, Answer | None], None], *, timeout: float) -> Exchange:
        """Connect within `timeout` seconds. Raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout):
            return (await loop.create_connection(lambda: cls(ended), address.host, address.port))[1]

    def send(self, request: bytes) -> None:
        """Send a whole request; what became of it comes through `ended`."""
        assert self._transport is not None
        self._transport.write(request)

    def close(self) -> None:
        """Close without another word to `ended`."""
        self._ended = _nobody
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        received = self._received = self._received + data if self._received else data
        end = received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = received[: end + 2].lower()
        body = received[end + 4 :]
        if len(body) < _content_length(head):
            return
        self._received = b""
        self._ended(self, Answer(int(head[9:12]), head, body))

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._ended(self, None)


def _nobody(exchange: Exchange, answer: Answer | None) -> None:
    return None


def _content_length(head: bytes) -> int:
    at = head.find(b"\r\ncontent-length: ")
    if at < 0:
        return 0
    at += len(b"\r\ncontent-length: ")
    return int(head[at : head.find(b"\r\n", at)])


def post_order(address: Address, body: bytes, *, key: str | None = None) -> bytes:
    """The bytes of `POST /orders` with that JSON body."""
    idempotency = f"Idempotency-Key: {key}\r\n" if key else ""
    return (
        f"POST /orders HTTP/1.1\r\nHost: {address.host}:{address.port}\r\nContent-Type: application/json\r\n"
        f"{idempotency}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def get(address: Address, path: str) -> bytes:
    """The bytes of `GET path`."""
    return f"GET {path} HTTP/1.1\r\nHost: {address.host}:{address.port}\r\n\r\n".encode()


async def ask(address: Address, request: bytes, *, timeout: float) -> Answer:
    """One request on a connection of its own. Raises OSError, or TimeoutError when it takes more than `timeout` seconds."""
    answered: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()

    def ended(_: Exchange, answer: Answer | None) -> None:
        if not answered.done():
            answered.set_result(answer)

    async with asyncio.timeout(timeout):
        exchange = await Exchange.open(address, ended, timeout=timeout)
        try:
            exchange.send(request)
            answer = await answered
        finally:
            exchange.close()
    if answer is None:
        raise ConnectionResetError("the connection was lost before the answer")
    return answer
