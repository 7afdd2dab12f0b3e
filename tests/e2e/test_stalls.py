"""A role that stands still in a real process: its supervisor starts it again as after a crash, and the process lives on."""

from __future__ import annotations

import asyncpg

from orderflow.engine.telemetry import PUBLISHER, WORKER
from tests.fleet import Client, Fleet, api_of
from tests.rows import settled, violations
from tests.servers import Broker

# The limit that follows from these is the least: four times as much.
TIMES = {
    "ORDERFLOW_STALL_SECONDS": "1", "ORDERFLOW_KAFKA_TIMEOUT_SECONDS": "2", "ORDERFLOW_DATABASE_TIMEOUT_SECONDS": "2",
    "ORDERFLOW_RECONCILE_SECONDS": "60",
}  # fmt: skip
STALLS = "publishing.send.before=delay(3600)@2; relay._sleep.before=delay(3600)@40; consumer._fetch.before=delay(3600)@2"


async def test_what_stands_still_is_started_again_and_nothing_is_lost(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    client = Client()
    async with Fleet(database_url, kafka, topic, **TIMES) as fleet:
        process = await fleet.run(ORDERFLOW_FAILPOINTS=STALLS)
        address = await api_of(process)
        await process.facts.until("ASSIGNED", service=WORKER)
        await client.place_many(address, 20)
        await process.facts.until("STALLED", service=PUBLISHER, timeout=60)
        await process.facts.until("STALLED", service=WORKER, timeout=60)
        await settled(connection)
        for role in ("publisher", "worker"):
            crash = await process.facts.until("ROLE_CRASHED", role=role)
            assert crash["error"].startswith("Stalled: ")
            await process.facts.until("ROLE_RESTARTED", role=role)
        process.stop()
        assert await process.end() == 0
    assert len(client.accepted) == 20
    assert await violations(connection, client.accepted) == {}
