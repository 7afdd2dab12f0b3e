"""A rolling restart under load: every process is replaced, and no client notices."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import asyncpg
import pytest

from orderflow.bench.load import Options
from orderflow.bench.persistent import PersistentClients
from orderflow.engine.telemetry import API, PROCESS
from tests.fleet import Fleet
from tests.rows import settled, violations
from tests.servers import Broker

COMMAND = ("--api", "2", "--publisher", "1", "--worker", "2")


async def test_every_process_is_replaced_and_no_request_fails(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, unused_tcp_port: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stop: list[object] = []
    monkeypatch.setattr("orderflow.bench.persistent.on_end_of_input", stop.append)
    options = Options("127.0.0.1", unused_tcp_port, 16, 120.0, str(tmp_path / "accepted"), persistent=True, rate=400.0)
    async with Fleet(database_url, kafka, topic, HTTP_PORT=str(unused_tcp_port), ORDERFLOW_GATEWAY_DELAY_MS="20") as fleet:
        parent = await fleet.run(*COMMAND)
        await parent.facts.until("STARTUP", service=API, count=2)
        clients = PersistentClients(options)
        load = asyncio.create_task(clients.run())
        before = {fact["processId"] for fact in parent.facts.of("PROCESS_STARTED", service=PROCESS)}
        parent.process.send_signal(signal.SIGUSR1)
        await parent.facts.until("ROLLING_RESTART_DONE", service=PROCESS, processes=5)
        clients._stop()
        summary = await load
        after = {fact["processId"] for fact in parent.facts.of("PROCESS_STARTED", service=PROCESS)} - before
        assert len(before) == len(after) == 5
        assert set(summary.answers) == {"201"}
        assert (summary.lost_connections, summary.unresolved, summary.contradictions) == (0, 0, [])
        assert summary.accepted > 100
        await settled(connection)
        assert await violations(connection) == {}
