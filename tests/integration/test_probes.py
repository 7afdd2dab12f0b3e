"""What /readyz says of servers that are away: how it is with them, and not where they are."""

from __future__ import annotations

import asyncio

from orderflow.health import Health
from orderflow.probes import Probes


async def test_what_is_away_is_told_without_its_address(unused_tcp_port: int) -> None:
    health = Health()
    await Probes(
        health, f"127.0.0.1:{unused_tcp_port}", f"postgresql://u:p@no-such-host.invalid:{unused_tcp_port}/d"
    ).run_once()
    dependencies = health.snapshot()["dependencies"]
    assert dependencies["kafka"] == {"state": "down", "detail": "refuses connections"}
    assert dependencies["postgres"] == {"state": "down", "detail": "cannot be reached: gaierror"}


async def test_one_broker_that_answers_is_enough(unused_tcp_port: int) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    health = Health()
    async with server:
        await Probes(health, f"127.0.0.1:{unused_tcp_port}, 127.0.0.1:{port}", None).run_once()
    assert health.snapshot()["dependencies"] == {"kafka": {"state": "up", "detail": ""}}
