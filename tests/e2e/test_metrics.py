"""/metrics over processes that share their counts: a sibling's are there soon, and all of them after its drain."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import asyncpg

from tests.fleet import Client, Fleet, api_of
from tests.rows import set_mode, settled
from tests.servers import Broker
from tests.waiting import eventually

ORDERS = 30


async def scrape(address: str) -> dict[str, float]:
    async with aiohttp.ClientSession() as session, session.get(f"{address}/metrics") as response:
        lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
    return {name: float(number) for name, number in (line.rsplit(" ", 1) for line in lines)}


async def test_the_api_shows_what_its_siblings_count(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, tmp_path: Path
) -> None:
    await set_mode(connection, "succeed")
    async with Fleet(database_url, kafka, topic, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)) as fleet:
        api, _publisher, worker = [await fleet.run("--role", role) for role in ("api", "publisher", "worker")]
        address = await api_of(api)
        await Client().place_many(address, ORDERS)
        await settled(connection)
        worker.stop()
        assert await worker.end() == 0
        found = await scrape(address)
        assert found['orderflow_payments_total{status="SUCCESS"}'] == ORDERS
        assert found['orderflow_http_requests_total{method="POST",route="/orders",status="201"}'] == ORDERS
        for stage in ("accepted", "charged", "settled"):
            assert found[f'orderflow_stage_seconds_count{{stage="{stage}"}}'] == ORDERS

        async def the_publishers_are_there() -> bool:
            found = await scrape(address)
            paid = found.get('orderflow_events_published_total{event_type="OrderPaid"}')
            return (paid, found['orderflow_stage_seconds_count{stage="published"}']) == (ORDERS, 2 * ORDERS)

        # It lives, and nobody asks it.
        await eventually(the_publishers_are_there)
