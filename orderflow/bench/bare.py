"""Reference A: a web application that reads the same POST, answers it, and stores nothing. A process of its own."""

from __future__ import annotations

import asyncio
import secrets
import sys
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from orderflow.bench.exchange import Address, ask, get
from orderflow.bench.load import Options
from orderflow.bench.program import PROBE_TIMEOUT, READY_TIMEOUT, environment_of
from orderflow.bench.results import Reference
from orderflow.bench.sending import send
from orderflow.bench.usage import Meter, Usage
from orderflow.embedded import ports
from orderflow.embedded.process import GuardedChild
from orderflow.engine.ids import new_id


async def _accept(request: web.Request) -> web.Response:
    order = await request.json(loads=orjson.loads)
    order_id = str(new_id())
    return web.Response(
        status=201, body=orjson.dumps({"orderId": order_id, "state": "CREATED", **order}),
        headers={"Content-Type": "application/json", "Location": f"/orders/{order_id}"},
    )  # fmt: skip


async def _ready(request: web.Request) -> web.Response:
    return web.Response()


def application() -> web.Application:
    """`POST /orders`, and `GET /readyz`."""
    app = web.Application()
    app.add_routes([web.post("/orders", _accept), web.get("/readyz", _ready)])
    return app


async def measure(directory: Path, *, seconds: float, connections: int, warm_up: float) -> Reference:
    """A closed loop of POSTs. Raises EmbeddedError, ProgramFailed."""
    address = Address(ports.HOST, ports.free_port())
    name = f"bare-{secrets.token_hex(3)}"
    child = await GuardedChild.spawn(
        [sys.executable, "-m", "orderflow.bench.bare", str(address.port)],
        name="reference A", log=directory / f"{name}.log", cwd=directory, env=environment_of({}),
    )  # fmt: skip

    async def ready() -> bool:
        return (await ask(address, get(address, "/readyz"), timeout=PROBE_TIMEOUT)).status == 200

    record = str(directory / f"{name}.accepted")
    try:
        await child.until_ready(ready, READY_TIMEOUT)
        await send(Options(address.host, address.port, connections, warm_up, record))
        meter = Meter({"bare aiohttp": child.pid})
        meter.start()
        load = await send(Options(address.host, address.port, connections, seconds, record, seed=2))
        usage = [*await meter.stop(), Usage("load", 0, load.cpu_seconds, load.peak_bytes)]
        return Reference(load.accepted, load.last_answered - load.first_sent, usage, load)
    finally:
        await child.stop()


def main() -> int:
    loop: Any = None
    try:
        import uvloop

        loop = uvloop.new_event_loop()
    except ImportError:
        loop = asyncio.new_event_loop()
    web.run_app(application(), host=ports.HOST, port=int(sys.argv[1]), access_log=None, print=None, loop=loop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
