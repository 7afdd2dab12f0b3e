"""The worker that probes an absent gateway is killed with SIGKILL: its claim runs out, and another one probes."""

from __future__ import annotations

import signal

import asyncpg

from orderflow.engine.telemetry import WORKER
from tests.fleet import Client, Fleet, api_of
from tests.rows import set_mode, settled, states, violations
from tests.servers import Broker

ORDERS = 50


async def test_another_worker_takes_the_probe_over(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    await set_mode(connection, "unavailable")
    client = Client()
    async with Fleet(database_url, kafka, topic, ORDERFLOW_GATEWAY_TIMEOUT_MS="500") as fleet:
        rest = await fleet.run("--role", "api", "--role", "publisher")
        prober = await fleet.run(
            "--role", "worker", ORDERFLOW_WORKER_ID="prober", ORDERFLOW_FAILPOINTS="circuit._claim.after=crash@1"
        )
        await prober.facts.until("STARTUP", service=WORKER)
        await client.place_many(await api_of(rest), ORDERS)
        await prober.facts.until("CIRCUIT_OPENED")
        assert await prober.end() == -signal.SIGKILL
        row = await connection.fetchrow("SELECT state, probes, worker_id FROM circuits")
        assert tuple(row) == ("half-open", 1, "prober")
        await set_mode(connection, "succeed")
        # Under another group: this one need not wait for the dead member's session to run out.
        heir = await fleet.run("--role", "worker", ORDERFLOW_WORKER_ID="heir", ORDERFLOW_CONSUMER_GROUP=f"{topic}-heir")
        await heir.facts.until("CIRCUIT_CLOSED")
        await settled(connection)
        row = await connection.fetchrow("SELECT state, probes, worker_id FROM circuits")
        assert tuple(row) == ("closed", 2, "heir")
        assert heir.facts.of("PROCESSING_ERROR") == []
        heir.stop()
        assert await heir.end() == 0
    assert await states(connection) == {"PAID": ORDERS}
    assert await connection.fetchval("SELECT count(*) FROM gateway_charges") == ORDERS
    assert await violations(connection, client.accepted) == {}
