"""Faults of clients: those who leave before the answer, who never end their bodies, who are too many, who ask for too much."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress

from orderflow.bench.exchange import post_order
from orderflow.bench.load import Options, Summary, order_body
from orderflow.bench.sending import send
from orderflow.torture.grounds import Action, Grounds
from orderflow.torture.plan import Fault, Kind

LEAVING = 100
SLOW = 200
MANY = 2_000
OVERLOADING = 256
CONNECT_TIMEOUT = 10.0
TRICKLE_EVERY = 0.5


class ClientFaults:
    """`actions`: by kind. `heard` is told what the overloading clients came to."""

    def __init__(self, grounds: Grounds, heard: Callable[[Summary], None]) -> None:
        self._grounds = grounds
        self._heard = heard
        self.actions: Mapping[Kind, Action] = {
            Kind.CLIENTS_DISCONNECT: self._leave,
            Kind.CLIENTS_SLOW: self._trickle,
            Kind.CLIENTS_MANY: self._crowd,
            Kind.CLIENTS_OVERLOAD: self._overload,
        }

    async def _leave(self, fault: Fault) -> str:
        source = random.Random(fault.pick)
        met = await asyncio.gather(*(self._leave_once(self._request(source), source.random() * 0.01) for _ in range(LEAVING)))
        return f"{sum(met)} clients"

    async def _leave_once(self, request: bytes, patience: float) -> bool:
        writer = await self._connect()
        if writer is None:
            return False
        writer.write(request)
        await asyncio.sleep(patience)
        writer.transport.abort()
        return True

    async def _trickle(self, fault: Fault) -> str:
        source = random.Random(fault.pick)
        met = await asyncio.gather(*(self._trickle_once(self._request(source), fault.lasts) for _ in range(SLOW)))
        return f"{sum(met)} clients"

    async def _trickle_once(self, request: bytes, seconds: float) -> bool:
        """All but the end of the request, a byte at a time from the body on."""
        writer = await self._connect()
        if writer is None:
            return False
        try:
            at = request.index(b"\r\n\r\n") + 4
            writer.write(request[:at])
            for byte in range(at, min(len(request) - 1, at + int(seconds / TRICKLE_EVERY))):
                await asyncio.sleep(TRICKLE_EVERY)
                writer.write(request[byte : byte + 1])
        finally:
            writer.transport.abort()
        return True

    async def _crowd(self, fault: Fault) -> str:
        writers = [writer for writer in await asyncio.gather(*(self._connect() for _ in range(MANY))) if writer is not None]
        await asyncio.sleep(fault.lasts)
        for writer in writers:
            writer.transport.abort()
        return f"{len(writers):,} connections"

    async def _overload(self, fault: Fault) -> str:
        record = self._grounds.directory / f"accepted-{len(self._grounds.records)}"
        record.touch()
        self._grounds.records.append(record)
        address = self._grounds.address
        options = Options(
            address.host, address.port, OVERLOADING, fault.lasts, str(record), persistent=True, rate=0.0, seed=fault.pick
        )
        summary = await send(options, asyncio.Event())
        self._heard(summary)
        refused = summary.answers.get("429", 0)
        return f"{summary.accepted:,} orders accepted, {refused:,} answers of 429"

    def _request(self, source: random.Random) -> bytes:
        # A key for each, as the whole torture has it: an order without one is a request that was carried out twice.
        return post_order(self._grounds.address, order_body(source), key=str(uuid.UUID(int=source.getrandbits(128))))

    async def _connect(self) -> asyncio.StreamWriter | None:
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_TIMEOUT):
                address = self._grounds.address
                return (await asyncio.open_connection(address.host, address.port))[1]
        return None
