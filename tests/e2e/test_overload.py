"""Far more load than the API can carry: 429 with Retry-After, memory that does not grow, accepted orders unharmed, recovery."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections import Counter
from pathlib import Path
from uuid import UUID

import aiohttp
import asyncpg
import pytest

from tests.fleet import Fleet, api_of
from tests.waiting import eventually

CLIENTS = 200
# What one process can carry here: five orders in a statement, one statement at a time, each held up for so long.
SETTINGS = {
    "ORDERFLOW_BATCH_SIZE": "5", "ORDERFLOW_BATCHES_IN_FLIGHT": "1", "ORDERFLOW_HTTP_QUEUE": "20",
    "ORDERFLOW_FAILPOINTS": "store.place.before=delay(0.2)",
}  # fmt: skip
ANSWERS = 12000
# The clients' pace, and how far a process may grow while it turns them away.
PAUSE = 0.02
GROWTH = 1.2
RECOVERY_SECONDS = 5.0


class Crowd:
    """Clients that ask again and again, whatever the answer; `news` is told of each."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.answers: Counter[tuple[int, bool]] = Counter()
        self.accepted: list[UUID] = []
        self.news = asyncio.Event()

    async def place(self, session: aiohttp.ClientSession) -> int:
        body = {"userId": str(uuid.uuid4()), "amount": "10.00"}
        async with session.post(f"{self._address}/orders", json=body) as response:
            answer = await response.json(content_type=None)
        if response.status == 201:
            self.accepted.append(UUID(answer["orderId"]))
        self.answers[response.status, "Retry-After" in response.headers] += 1
        self.news.set()
        return response.status

    async def keep_placing(self, session: aiohttp.ClientSession) -> None:
        while True:
            await self.place(session)
            # The pace of the load, not a wait for anything.
            await asyncio.sleep(PAUSE)

    async def has_had(self, answers: int) -> None:
        async with asyncio.timeout(120):
            while self.answers.total() < answers:
                self.news.clear()
                await self.news.wait()


def resident_bytes(pid: int) -> int:
    """What the process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which is Linux's")
async def test_ten_times_the_load_it_can_carry(connection: asyncpg.Connection, database_url: str) -> None:
    async with Fleet(database_url, None, "unused", **SETTINGS) as fleet:
        api = await fleet.run("--role", "api")
        crowd = Crowd(await api_of(api))
        limits = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(total=30)) as session:
            clients = [asyncio.create_task(crowd.keep_placing(session)) for _ in range(CLIENTS)]
            try:
                await crowd.has_had(ANSWERS // 3)
                early = resident_bytes(api.process.pid)
                await crowd.has_had(ANSWERS)
                late = resident_bytes(api.process.pid)
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
            # Accepted or turned away with the word when to come again; never a crash, a reset or a time-out.
            assert set(crowd.answers) == {(201, False), (429, True)}, crowd.answers
            assert crowd.answers[429, True] >= 9 * crowd.answers[201, False], crowd.answers
            assert late <= early * GROWTH, (early, late)

            async def accepts() -> bool:
                return await crowd.place(session) == 201

            await eventually(accepts, RECOVERY_SECONDS, what="an order is accepted again")
        lost = await connection.fetchval(
            "SELECT count(*) FROM unnest($1::uuid[]) AS a(id) WHERE NOT EXISTS (SELECT FROM orders o WHERE o.id = a.id)",
            crowd.accepted,
        )
        assert lost == 0
        # Nobody's order but those, and of those who left in the middle one each at the most.
        assert await connection.fetchval("SELECT count(*) FROM orders") <= len(crowd.accepted) + CLIENTS
        api.stop()
        assert await api.end() == 0
