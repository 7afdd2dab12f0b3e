"""SIGKILL to each role's process under load: when the dust has settled, nothing is lost and nothing is there twice."""

from __future__ import annotations

import asyncio

import asyncpg

from orderflow.engine.telemetry import API, PUBLISHER, WORKER
from tests.fleet import Client, Fleet, Process
from tests.rows import set_mode, settled, states, violations
from tests.servers import Broker

SERVICES = {"api": API, "publisher": PUBLISHER, "worker": WORKER}


async def start(fleet: Fleet, role: str) -> Process:
    process = await fleet.run("--role", role)
    await process.facts.until("STARTUP", service=SERVICES[role])
    return process


async def test_any_process_is_killed_under_load(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, unused_tcp_port: int
) -> None:
    client = Client()
    async with Fleet(database_url, kafka, topic, HTTP_PORT=str(unused_tcp_port), ORDERFLOW_GATEWAY_DELAY_MS="200") as fleet:
        processes = {role: await start(fleet, role) for role in SERVICES}
        load = asyncio.create_task(client.keep_placing(f"http://127.0.0.1:{unused_tcp_port}"))
        try:
            # The worker first: the group waits for the dead member's session to run out, and the others die meanwhile.
            await processes["worker"].facts.until("STATE_CHANGE", count=10, newState="PAYMENT_PENDING")
            for role in ("worker", "publisher", "api", "publisher"):
                processes[role].kill()
                await processes[role].end()
                processes[role] = await start(fleet, role)
                await client.has_placed(25)
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        await settled(connection)
        for process in processes.values():
            process.stop()
        assert [await process.end() for process in processes.values()] == [0, 0, 0]
    assert await violations(connection, client.accepted) == {}
    assert sum((await states(connection)).values()) >= len(client.accepted) >= 100


async def test_the_worker_is_killed_between_pending_and_paid(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    await set_mode(connection, "succeed")
    client = Client()
    async with Fleet(database_url, kafka, topic, ORDERFLOW_GATEWAY_DELAY_MS="300") as fleet:
        rest = await fleet.run("--role", "api", "--role", "publisher")
        worker = await start(fleet, "worker")
        startup = await rest.facts.until("STARTUP", service=API)
        await client.place_many(startup["message"].rpartition(" ")[2], 10)
        await worker.facts.until("STATE_CHANGE", count=10, newState="PAYMENT_PENDING")
        worker.kill()
        await worker.end()
        # Some charges may stand in the gateway's ledger, and no worker knows of them.
        assert (await states(connection)).get("PAYMENT_PENDING", 0) + (await states(connection)).get("PAID", 0) == 10
        # Under another group: this one need not wait for the dead member's session to run out, and gets everything again.
        heir = await fleet.run("--role", "worker", ORDERFLOW_CONSUMER_GROUP=f"{topic}-heir")
        await settled(connection)
        heir.stop()
        assert await heir.end() == 0
    assert await states(connection) == {"PAID": 10}
    assert await connection.fetchval("SELECT count(*) FROM gateway_charges") == 10
    assert await violations(connection, client.accepted) == {}
