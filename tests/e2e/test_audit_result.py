"""/readyz of every process of a split deployment shows what the one elected process has found."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import aiohttp
import asyncpg

from orderflow.engine.telemetry import PUBLISHER, WORKER
from tests.fleet import Fleet, Process, api_of
from tests.old import backdate, finished
from tests.servers import Broker
from tests.waiting import eventually

HOUR = 1 / 24


async def operations_of(process: Process) -> str:
    """The address of the metrics port of a process without the API."""
    startup = await process.facts.until("STARTUP", service="orderflow")
    return str(startup["message"]).rpartition(" ")[2]


async def readiness(session: aiohttp.ClientSession, address: str) -> tuple[int, dict[str, Any]]:
    async with session.get(f"{address}/readyz") as response:
        return response.status, await response.json()


async def test_api_publisher_and_worker_show_the_same_result(
    connection: asyncpg.Connection,
    database_url: str,
    kafka: Broker,
    topic: str,
    unused_tcp_port_factory: Callable[[], int],
) -> None:
    ((wrong, _), _) = await finished(connection, database_url, 2)
    await connection.execute("DELETE FROM gateway_charges WHERE reference = $1", wrong)
    await backdate(connection, HOUR)
    async with Fleet(database_url, kafka, topic) as fleet, aiohttp.ClientSession() as session:
        publisher = await fleet.run("--role", "publisher", ORDERFLOW_METRICS_PORT=str(unused_tcp_port_factory()))
        await publisher.facts.until("AUDIT_VIOLATION", orderId=str(wrong))
        await eventually(lambda: connection.fetchval("SELECT count(*) FROM audit_result"), what="the result is noted")
        worker = await fleet.run("--role", "worker", ORDERFLOW_METRICS_PORT=str(unused_tcp_port_factory()))
        api = await fleet.run("--role", "api")
        await publisher.facts.until("STARTUP", service=PUBLISHER)
        await worker.facts.until("STARTUP", service=WORKER)
        addresses = [await operations_of(publisher), await operations_of(worker), await api_of(api)]
        for address in addresses:
            await eventually(partial(seen, session, address), what=f"{address} is ready and shows it")
            _, body = await readiness(session, address)
            assert (body["status"], body["audit"]["violations"], body["audit"]["orders"]) == ("ready", 1, 2)
            assert body["audit"]["byInvariant"]["I3"] == 1
            assert body["audit"]["process"] == f"{publisher.process.pid}@{socket.gethostname()}"
            assert body["audit"]["at"].endswith("Z")
        # What is known stays, with its time, where nobody audits any more.
        os.kill(publisher.process.pid, signal.SIGKILL)
        assert await publisher.end() == -signal.SIGKILL
        assert (await readiness(session, addresses[2]))[1]["audit"]["violations"] == 1


async def seen(session: aiohttp.ClientSession, address: str) -> bool:
    status, body = await readiness(session, address)
    return status == 200 and "audit" in body
