"""`orderflow run --api 1 --publisher 1 --worker 2` under load: one process of each role is killed, and the parent itself."""

from __future__ import annotations

import asyncio
import os
import signal

import asyncpg

from orderflow.engine.telemetry import API, PROCESS, PUBLISHER, WORKER
from tests.fleet import Client, Fleet, Process
from tests.programs import alive
from tests.rows import settled, states, violations
from tests.servers import Broker
from tests.waiting import eventually

PROCESSES = {"api-1": API, "publisher-1": PUBLISHER, "worker-1": WORKER, "worker-2": WORKER}
COMMAND = ("--api", "1", "--publisher", "1", "--worker", "2")


async def start(fleet: Fleet) -> Process:
    """The one command, as soon as each of its four children is at work."""
    parent = await fleet.run(*COMMAND)
    for service in (API, PUBLISHER):
        await parent.facts.until("STARTUP", service=service)
    await parent.facts.until("STARTUP", service=WORKER, count=2)
    return parent


def children(parent: Process) -> dict[str, int]:
    """The processes that run in each place now; of those that were started there, the last."""
    return {fact["process"]: fact["processId"] for fact in parent.facts.of("PROCESS_STARTED", service=PROCESS)}


async def kill_child(parent: Process, name: str) -> None:
    """SIGKILL to one child, and wait until its successor is at work."""
    service = PROCESSES[name]
    before = len(parent.facts.of("STARTUP", service=service))
    victim = children(parent)[name]
    os.kill(victim, signal.SIGKILL)
    await parent.facts.until("PROCESS_CRASHED", process=name, processId=victim, signal="SIGKILL")
    await parent.facts.until("PROCESS_STARTED", process=name, count=2)
    await parent.facts.until("STARTUP", service=service, count=before + 1)
    assert children(parent)[name] != victim


async def kill_parent(parent: Process) -> None:
    """SIGKILL to the parent, and wait until nobody is left whom it ever started."""
    started = [fact["processId"] for fact in parent.facts.of("PROCESS_STARTED", service=PROCESS)]
    assert len(started) == len(PROCESSES) + 3
    parent.kill()
    # Its children hold the same stdout: that ends with the last of them.
    assert await parent.end() == -signal.SIGKILL
    await eventually(lambda: not any(map(alive, started)), what="no child outlives the parent")


async def test_the_parent_and_each_of_its_children_are_killed_under_load(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, unused_tcp_port: int
) -> None:
    client = Client()
    async with Fleet(database_url, kafka, topic, HTTP_PORT=str(unused_tcp_port)) as fleet:
        parent = await start(fleet)
        assert set(children(parent)) == set(PROCESSES)
        load = asyncio.create_task(client.keep_placing(f"http://127.0.0.1:{unused_tcp_port}"))
        try:
            await client.has_placed(25)
            # The worker first: the group waits for the dead member's session to run out, and the others die meanwhile.
            for name in ("worker-1", "publisher-1", "api-1"):
                await kill_child(parent, name)
                await client.has_placed(25)
            await kill_parent(parent)
            successor = await start(fleet)
            await client.has_placed(25)
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        await settled(connection)
        successor.stop()
        assert await successor.end() == 0
        assert not any(map(alive, children(successor).values()))
    assert successor.errors == []
    assert await violations(connection, client.accepted) == {}
    assert set(await states(connection)) <= {"PAID", "FAILED"}
    assert sum((await states(connection)).values()) >= len(client.accepted) >= 125
