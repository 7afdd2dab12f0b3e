"""A gateway that blocks the event loop of a worker: its process ends, the parent starts another, and every order ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import asyncpg

from orderflow.engine.telemetry import API, PROCESS, PUBLISHER, WORKER
from tests.fleet import Client, Fleet, Process
from tests.rows import set_mode, settled, states, violations
from tests.servers import Broker

# The program with another gateway: the first charge of all its processes is made, and then nothing in that process turns.
# Its children are started with the same text.
PROGRAM = """
import os, sys, time
from functools import partial
import orderflow.app
from orderflow.cli import main
from orderflow.payments.simulated import SimulatedGateway

class Blocking(SimulatedGateway):
    async def charge(self, request):
        result = await super().charge(request)
        try:
            os.close(os.open(os.environ["BLOCKED"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return result
        time.sleep(3600)

def command(role):
    return [*sys.orig_argv[:3], "run", "--role", role]

orderflow.app.SimulatedGateway = Blocking
orderflow.app.run_processes = partial(orderflow.app.run_processes, command=command)
main()
"""
# The limit that follows from these is the least: four times as much.
TIMES = {
    "ORDERFLOW_STALL_SECONDS": "1", "ORDERFLOW_KAFKA_TIMEOUT_SECONDS": "2", "ORDERFLOW_DATABASE_TIMEOUT_SECONDS": "2",
    "ORDERFLOW_RECONCILE_SECONDS": "60",
}  # fmt: skip


async def test_a_worker_whose_gateway_blocks_is_replaced_and_every_order_ends(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, unused_tcp_port: int, tmp_path: Path
) -> None:
    await set_mode(connection, "succeed")
    client = Client()
    async with Fleet(database_url, kafka, topic, HTTP_PORT=str(unused_tcp_port), **TIMES) as fleet:
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("ORDERFLOW_")}
        parent = await Process.spawn(
            sys.executable, "-c", PROGRAM, "run", "--api", "1", "--publisher", "1", "--worker", "1",
            environment={**inherited, **fleet.environment, "BLOCKED": str(tmp_path / "blocked")},
        )  # fmt: skip
        fleet.processes.append(parent)
        for service in (API, PUBLISHER, WORKER):
            await parent.facts.until("STARTUP", service=service)
        worker = parent.facts.of("PROCESS_STARTED", process="worker-1")[0]["processId"]
        await client.place_many(f"http://127.0.0.1:{unused_tcp_port}", 20)
        told = await parent.facts.until("LOOP_BLOCKED", service=PROCESS, timeout=60)
        assert told["seconds"] == 8
        assert "Blocking.charge" in told["at"]
        assert "ChargeHandler" in told["stack"]
        await parent.facts.until("PROCESS_CRASHED", process="worker-1", processId=worker, exitCode=1)
        await parent.facts.until("STARTUP", service=WORKER, count=2)
        await settled(connection)
        parent.stop()
        assert await parent.end() == 0
    assert await states(connection) == {"PAID": 20}
    assert await violations(connection, client.accepted) == {}
    assert len(parent.facts.of("LOOP_BLOCKED")) == len(parent.facts.of("PROCESS_CRASHED")) == len(parent.errors) == 1


async def test_a_process_that_is_stopped_for_longer_than_the_limit_is_not_ended(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    client = Client()
    times = {**TIMES, "ORDERFLOW_KAFKA_TIMEOUT_SECONDS": "0.5", "ORDERFLOW_DATABASE_TIMEOUT_SECONDS": "1.5"}
    async with Fleet(database_url, kafka, topic, **times) as fleet:
        process = await fleet.run()
        address = str((await process.facts.until("STARTUP", service=API))["message"]).rpartition(" ")[2]
        await process.facts.until("ASSIGNED", service=WORKER)
        process.process.send_signal(signal.SIGSTOP)
        # What it is stopped for: longer than the limit of four seconds by the clock.
        await asyncio.sleep(6.0)
        process.process.send_signal(signal.SIGCONT)
        await client.place_many(address, 5)
        await settled(connection)
        process.stop()
        assert await process.end() == 0
    assert process.facts.of("LOOP_BLOCKED") == process.errors == []
    assert await violations(connection, client.accepted) == {}
